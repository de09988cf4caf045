"""Every way of routing by name: how one is found, checked and built from the configuration."""

import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.hints import did_you_mean
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import settings_of
from megatron_moe.config.values import written
from megatron_moe.moe.routers.options import parse_options
from megatron_moe.moe.routers.registry import ROUTERS
from megatron_moe.moe.routers.router import Router, Site
from megatron_moe.moe.sparse_layer import SparseLayer
from megatron_moe.moe.unrouted.registry import UNROUTED
from megatron_moe.moe.unrouted.unrouted_layer import LayerSite, UnroutedLayer

Method = type[Router] | type[UnroutedLayer]
BASES = (Router, UnroutedLayer)
METHODS: dict[str, Method] = {**ROUTERS, **UNROUTED}


def build_router(config: MoEConfig, hidden_size: int, site: Site) -> Router:
    """The router that the configuration names, its parameters on meta.

    Raises ConfigError for an unknown router, a wrong option, or a field of [moe] that this router does not read.
    """
    router = find_method(config.router_type)
    assert issubclass(router, Router)
    refuse_unused(router, config)
    return router(config, hidden_size, parse_options(router.Options, config), site)


def build_unrouted(config: MoEConfig, site: LayerSite) -> UnroutedLayer:
    """The layer that the configuration names, its parameters on meta. Raises ConfigError like build_router."""
    layer = find_method(config.router_type)
    assert issubclass(layer, UnroutedLayer)
    refuse_unused(layer, config)
    return layer(config, parse_options(layer.Options, config), site)


def find_method(router_type: str) -> Method:
    """The class behind a name of ROUTERS or UNROUTED, or behind path/to/file.py:ClassName."""
    path, colon, name = router_type.rpartition(":")
    if colon:
        return _load(Path(path), name)
    if router_type not in METHODS:
        hint = did_you_mean(router_type, METHODS) or "."
        raise ConfigError(
            f"--moe-router-type {router_type}: there is no such router{hint} "
            f"Use one of {', '.join(METHODS)}, or path/to/file.py:ClassName."
        )
    return METHODS[router_type]


def deciding_part(layer: SparseLayer) -> Router | UnroutedLayer:
    """Who decides in a sparse layer: its router, or the layer itself."""
    found = layer.decider
    assert isinstance(found, BASES)
    return found


def refuse_unused(router: Method, config: MoEConfig) -> None:
    """What differs from its default was meant to have an effect."""
    for name in router.unused_fields:
        setting = settings_of(MoEConfig)[name]
        value = getattr(config, name)
        says_the_same = name == "router_topk" and value == router.choices(config)
        if value != setting.default and not says_the_same:
            raise ConfigError(
                f"{setting.flag} {written(value)} has no effect with the router {config.router_type}; leave it out."
            )


def _load(path: Path, name: str) -> Method:
    """A router from a file outside the package."""
    if not path.is_file():
        raise ConfigError(f"--moe-router-type {path}:{name}: there is no file {path.absolute()}.")
    place = str(path.resolve())
    module_name = f"outside_router_{hashlib.sha256(place.encode()).hexdigest()[:16]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, place)
        if spec is None or spec.loader is None:
            raise ConfigError(f"--moe-router-type {path}:{name}: the name of a Python file must end in .py.")
        module = importlib.util.module_from_spec(spec)
        # known before it runs, as dataclasses and type hints demand
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            problem = f"{type(error).__name__}: {error}"
            raise ConfigError(f"--moe-router-type {path}:{name}: running {path} fails with {problem}") from error
    found = getattr(sys.modules[module_name], name, None)
    if not (inspect.isclass(found) and issubclass(found, BASES)):
        there = [key for key, value in vars(sys.modules[module_name]).items() if _is_own_router(value, module_name)]
        raise ConfigError(
            f"--moe-router-type {path}:{name}: {name} is not a Router of that file; "
            f"it has {', '.join(there) or 'none'}. A router derives from megatron_moe.moe.routers.router.Router."
        )
    return found


def _is_own_router(value: object, module_name: str) -> bool:
    return inspect.isclass(value) and issubclass(value, BASES) and value.__module__ == module_name
