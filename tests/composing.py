"""What Hydra composes of the choices of groups alone is kept in a process of tests, and in those that it forks.

Hydra reads and merges all files of the defaults list anew for each command line, in 0.07 s of a core, and tests compose some thousand
times. Here every command line gets a copy of what was made of the same choices, over which Hydra puts the values, as ever. New choices,
folders of the user's own, and all that a shell starts, are composed without this.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override

from conf.schema import ROOT

OURS = ["hydra.conf", str(ROOT / "conf"), ""]
"""Where files come from if a command line names no folder of its own."""


def keep_groups() -> None:
    """From here on, in this process."""
    list_defaults = config_loader_impl.create_defaults_list
    merge_defaults = ConfigLoaderImpl._compose_config_from_defaults_list
    lists: dict[tuple, DefaultsList] = {}
    merged: dict[str, Any] = {}

    def list_once(
        repo: IConfigRepository, config_name: str, overrides_list: list[Override], **more: bool
    ) -> DefaultsList:
        if not is_ours(repo) or any(one.is_sweep_override() for one in overrides_list):
            return list_defaults(repo=repo, config_name=config_name, overrides_list=overrides_list, **more)
        values = [
            one for one in overrides_list if isinstance(one.value(), dict) or not repo.group_exists(one.key_or_group)
        ]
        groups = [one for one in overrides_list if one not in values]
        key = config_name, *(one.input_line for one in groups), *more.items()
        if key not in lists:
            lists[key] = list_defaults(repo=repo, config_name=config_name, overrides_list=groups, **more)
        return replace(lists[key], config_overrides=values)

    def merge_once(loader: ConfigLoaderImpl, defaults: list, repo: IConfigRepository) -> Any:
        if not is_ours(repo):
            return merge_defaults(loader, defaults=defaults, repo=repo)
        key = repr(defaults)
        if key not in merged:
            merged[key] = merge_defaults(loader, defaults=defaults, repo=repo)
        return deepcopy(merged[key])

    config_loader_impl.create_defaults_list = list_once
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once
    # Hydra copies where it looks for files for each command line, and the whole schema with that.
    ConfigStore.__deepcopy__ = lambda store, _: store


def is_ours(repo: IConfigRepository) -> bool:
    return [source.path for source in repo.get_sources()] == OURS
