"""What a run is: frozen dataclasses, from which the flags and the recipes are derived; standard library only."""
