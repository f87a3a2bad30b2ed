"""Replace submodules by name."""

from torch import nn


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule at the dotted `path`.

    Raises:
        AttributeError: there is no submodule at `path`.
    """
    root.get_submodule(path)
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
