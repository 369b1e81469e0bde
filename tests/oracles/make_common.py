"""What the scripts that run torch peers share: tensors, a fake trainer, a cut of a long method, the file.

A peer's loss is run as it is. Where it sits in a method of a trainer, the trainer is made without its constructor and
given the attributes that the method reads, and its model returns the log-probabilities that the inputs hold. Where the
loss is some lines in the middle of a long method, `lines_of` cuts these lines out of the installed source and they are
executed as they stand.
"""

import contextlib
import inspect
import json
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from tests.oracles.inputs import SETS, weights

torch.set_default_dtype(torch.float64)


class Recorder:
    """The cases of one peer, written to `<name>.json` beside this file."""

    def __init__(self, name: str, packages: list[str], **versions: str):
        self.path = Path(__file__).parent / f"{name}.json"
        self.versions = {package: _version(package) for package in packages} | versions
        self.inputs: dict[str, Any] = {}
        self.cases: dict[str, Any] = {}

    def case(
        self,
        name: str,
        inputs: str,
        fn: Callable[..., torch.Tensor],
        wrt: str = "",
        params: dict[str, Any] | None = None,
    ):
        """Run `fn` on an input set's tensors; keep its value and the gradients of its weighted sum by `wrt`'s names."""
        arrays = SETS[inputs]()
        self.inputs[inputs] = {key: x.tolist() for key, x in arrays.items()}
        tensors = {key: torch.tensor(x) for key, x in arrays.items()}
        leaves = [tensors[key].requires_grad_() for key in wrt.split()]
        value = fn(SimpleNamespace(**tensors), **(params or {}))
        total = (value * torch.tensor(weights(tuple(value.shape)))).sum()
        gradients = torch.autograd.grad(total, leaves) if leaves else ()
        self.cases[name] = {
            "inputs": inputs,
            "params": params or {},
            "value": value.detach().tolist(),
            "gradients": {key: g.tolist() for key, g in zip(wrt.split(), gradients, strict=True)},
        }

    def write(self):
        """One case a line, so that a diff shows which numbers moved."""
        parts = [f'"versions": {json.dumps(self.versions)}']
        for key, entries in (("inputs", self.inputs), ("cases", self.cases)):
            lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
            parts.append(f'"{key}": {{\n{lines}\n}}')
        self.path.write_text("{" + ",\n".join(parts) + "}\n")
        print(f"{self.path.name}: {len(self.cases)} cases, {self.path.stat().st_size / 1000:.0f} kB")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unpacked, not installed"


def by_row(x: SimpleNamespace, fn: Callable[[SimpleNamespace], torch.Tensor]) -> torch.Tensor:
    """`fn` of each row alone, stacked: a peer that only returns the mean of a batch so tells its value a row."""
    count = len(next(iter(vars(x).values())))
    rows = [SimpleNamespace(**{k: v[i : i + 1] for k, v in vars(x).items()}) for i in range(count)]
    return torch.stack([fn(row).reshape(()) for row in rows])


def identity(x, *args, **kwargs):
    """What gathers over one process."""
    return x


def accelerator() -> SimpleNamespace:
    """One process on the CPU."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        use_distributed=False,
        gather=identity,
        gather_for_metrics=identity,
        reduce=identity,
    )


def trainer(cls: type, **attributes) -> Any:
    """An instance of a trainer that was never constructed, in evaluation mode, with what its loss reads."""
    made = object.__new__(cls)
    common = {
        "accelerator": accelerator(),
        "model": SimpleNamespace(training=False, is_gradient_checkpointing=False),
        "aux_loss_enabled": False,
        "_total_train_tokens": 0,
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }
    vars(made).update(common | attributes)
    return made


def lines_of(fn: Callable, first: str, last: str) -> str:
    """The source of `fn` from the first line that holds `first` to the next that holds `last`, dedented."""
    lines = inspect.getsource(fn).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = next(i for i, line in enumerate(lines) if i >= start and last in line)
    return textwrap.dedent("\n".join(lines[start : stop + 1]))


def run_lines(source: str, module: ModuleType, **names) -> SimpleNamespace:
    """Execute a cut of a module's source with the module's globals and the given local names; all names after it."""
    scope = {**vars(module), **names}
    exec(source, scope)  # the peer's own lines
    return SimpleNamespace(**scope)


class _WideTorch:
    """`torch`, except that its float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@contextlib.contextmanager
def float64_throughout(*modules: ModuleType) -> Iterator[None]:
    """Keep a peer that casts to float32 in float64: `.float()` means `.double()`, and float32 in `modules` float64."""
    narrow = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    for module in modules:
        module.torch = _WideTorch()
    try:
        yield
    finally:
        torch.Tensor.float = narrow
        for module in modules:
            module.torch = torch


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A sequence's sum, for peers that take sums instead of tokens."""
    return (x * mask).sum(-1)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A sequence's mean over its kept tokens, likewise."""
    return masked_sum(x, mask) / mask.sum(-1)


def zeros_like_tokens(logps: torch.Tensor, **others) -> SimpleNamespace:
    """A model's output with these log-probabilities, and zeros where a trainer only reads metrics."""
    zeros = torch.zeros_like(logps).detach()
    return SimpleNamespace(
        log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros, **others
    )


def shifted(mask: torch.Tensor) -> torch.Tensor:
    """A completion mask over tokens, one longer than the mask over predictions that the inputs hold."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).to(torch.int64)


def policy_trainer(cls, x, *, loss_type="grpo", level="token", low=0.2, high=0.2, beta=0.0, delta=None, max_length=10):
    """A GRPO trainer (or one of its children) whose model returns `x.logps`."""
    made = trainer(
        cls,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=low,
        epsilon_high=high,
        beta=beta,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        max_completion_length=max_length,
        _entropy_bonus_enabled=False,
    )
    zeros = torch.zeros_like(x.logps).detach()
    made._get_per_token_logps_and_entropies = lambda *args, **kwargs: (x.logps, zeros, None)
    return made


def policy_inputs(x, **others):
    """The batch that `_compute_loss` reads."""
    mask = x.mask.to(torch.int64)
    return {
        "prompt_ids": torch.zeros_like(mask[:, :1]),
        "prompt_mask": torch.ones_like(mask[:, :1]),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": x.seq_advantages,
        "old_per_token_logps": x.old_logps,
        "ref_per_token_logps": x.ref_logps,
        "num_items_in_batch": mask.sum(),
        **others,
    }
