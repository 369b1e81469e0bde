"""A reward of the user's own: a function in a Python file."""

import ast
import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.rewards.verifiers import TextReward, check_seconds


@dataclass(frozen=True)
class PythonReward(TextReward):
    """reward(prompts, completions, metadata) -> scores, one a completion, from a file; it runs in a process of its own.

    Prompts and completions are texts; of each row metadata has the other fields. What the file's globals hold stays
    from call to call. JAX has no accelerator there: those are the run's.
    """

    path: Path | str
    """The file."""
    function: str = "reward"
    """The function's name in it."""
    seconds: float = 60.0
    """Longest time that a batch may take."""

    def __post_init__(self) -> None:
        check_seconds(self.seconds)

    def prepare(self) -> None:
        """Run the file."""
        _load(str(self.path), self.function)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Sequence[float]:
        """What the function returns."""
        return _load(str(self.path), self.function)(prompts, completions, metadata)

    def check_inputs(self) -> None:
        """Raise UserError unless the file is Python and has such a name; nothing in it is run."""
        path = Path(self.path)
        if path.suffix != ".py":
            raise UserError(f"reward.path: {self.path}: a Python file's name ends in .py")
        try:
            tree = ast.parse(path.read_bytes())
        except OSError as error:
            raise UserError(f"reward.path: {self.path}: {error.strerror}") from None
        except (SyntaxError, ValueError) as error:
            raise UserError(f"reward.path: {self.path}: not Python ({error})") from None
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if self.function not in names:
            there = f"its functions are {', '.join(names)}" if names else "it has none"
            raise UserError(f"reward.function: {self.path} has no function {self.function!r}; {there}")


@functools.cache
def _load(path: str, function: str) -> Callable[..., Sequence[float]]:
    spec = importlib.util.spec_from_file_location("rlhf_jax_reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses of the file's own look for their names
    spec.loader.exec_module(module)
    return vars(module)[function]
