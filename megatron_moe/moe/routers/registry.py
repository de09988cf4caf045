"""Which routers there are: one line each; and how one is found, checked and built from the configuration."""

import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path

import torch

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.hints import did_you_mean
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import settings_of
from megatron_moe.config.values import written
from megatron_moe.moe.routers.expert_choice import ExpertChoiceRouter
from megatron_moe.moe.routers.gshard import GShardRouter
from megatron_moe.moe.routers.options import parse_options
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.routers.st_moe import STMoERouter
from megatron_moe.moe.routers.switch import SwitchRouter
from megatron_moe.moe.routers.top_k import TopKRouter
from megatron_moe.parallel.state import Axis

ROUTERS: dict[str, type[Router]] = {
    "top_k": TopKRouter,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "st_moe": STMoERouter,
    "expert_choice": ExpertChoiceRouter,
}


def build_router(config: MoEConfig, hidden_size: int, group_axis: Axis, dtype: torch.dtype, init_std: float) -> Router:
    """The router that the configuration names, its parameters on meta.

    group_axis: the ranks that share routing groups (tp_cp).   dtype: wide.   init_std: deviation of first weights.
    Raises ConfigError for an unknown router, a wrong option, or a field of [moe] that this router does not read.
    """
    router = find_router(config.router_type)
    _refuse_unused(router, config)
    options = parse_options(router, config)
    return router(config, hidden_size, options, group_axis, dtype, init_std)


def find_router(router_type: str) -> type[Router]:
    """The class behind a name of ROUTERS, or behind path/to/file.py:ClassName."""
    path, colon, name = router_type.rpartition(":")
    if colon:
        return _load(Path(path), name)
    if router_type not in ROUTERS:
        hint = did_you_mean(router_type, ROUTERS) or "."
        raise ConfigError(
            f"--moe-router-type {router_type}: there is no such router{hint} "
            f"Use one of {', '.join(ROUTERS)}, or path/to/file.py:ClassName."
        )
    return ROUTERS[router_type]


def _refuse_unused(router: type[Router], config: MoEConfig) -> None:
    """What differs from its default was meant to have an effect."""
    for name in router.unused_fields:
        setting = settings_of(MoEConfig)[name]
        value = getattr(config, name)
        says_the_same = name == "router_topk" and value == router.choices(config)
        if value != setting.default and not says_the_same:
            raise ConfigError(
                f"{setting.flag} {written(value)} has no effect with the router {config.router_type}; leave it out."
            )


def _load(path: Path, name: str) -> type[Router]:
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
    if not (inspect.isclass(found) and issubclass(found, Router)):
        there = [key for key, value in vars(sys.modules[module_name]).items() if _is_own_router(value, module_name)]
        raise ConfigError(
            f"--moe-router-type {path}:{name}: {name} is not a Router of that file; "
            f"it has {', '.join(there) or 'none'}. A router derives from megatron_moe.moe.routers.router.Router."
        )
    return found


def _is_own_router(value: object, module_name: str) -> bool:
    return inspect.isclass(value) and issubclass(value, Router) and value.__module__ == module_name
