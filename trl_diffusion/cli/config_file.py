# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The YAML file of a command."""

from typing import Any

import yaml

from ..messages import cut
from ..yaml_files import LARGEST, compose, construct


class UniqueKeyLoader(yaml.SafeLoader):
    """Loads YAML in which no mapping has a key twice; YAML itself would take the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key `{cut(key_node.value, 100)}` stands there twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_config(path: str) -> dict[str, Any]:
    """
    Reads the file that `--config` names.

    Args:
        path (`str`):
            The file.

    Returns:
        `dict[str, Any]`: its keys and values.

    Raises:
        `ValueError`: If it cannot be read, is no YAML, or holds anything but different keys with values.
    """
    try:
        with open(path, encoding="utf-8") as file:
            config = construct(compose(file.read(LARGEST + 1)), UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"`--config` {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`--config` {path} is no text file in UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"`--config` {path} is no valid YAML: {where}{cut(error.problem)}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"`--config` {path} is no valid YAML: {cut(str(error))}.") from error
    if config is None:
        return {}
    if not isinstance(config, dict) or not all(isinstance(key, str) and key.isprintable() for key in config):
        raise ValueError(f"`--config` {path} must hold lines of the form `flag: value`.")
    return config
