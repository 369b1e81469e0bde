"""`load_pretrained`: a model from whatever holds one; and the way to say so in a config."""

import functools
import re
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from rlhf_jax import models, sharding
from rlhf_jax.data.sources import Data
from rlhf_jax.errors import UserError
from rlhf_jax.interop import workdir as runs
from rlhf_jax.interop.hf_folder import CONFIG, folder_spec, load_folder
from rlhf_jax.interop.peft_layout import CONFIG as ADAPTER
from rlhf_jax.interop.peft_load import adapter_base, is_adapter, load_adapter
from rlhf_jax.interop.pretrained import Bundled, Pretrained, Scratch
from rlhf_jax.interop.tokenizers import Tokenizer, load_tokenizer
from rlhf_jax.models import lora as adaptation
from rlhf_jax.models import quantized
from rlhf_jax.models.spec import Attention, DType, Lora, ModelSpec, Remat
from rlhf_jax.types import Key, Params

DTYPES = ("float32", "bfloat16")

# What a model and its tokenizer are made of; nothing pickled, no code.
_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
# Fields of a ModelSpec that are not the model's own.
_NUMERICS = ("dtype", "attention", "remat", "unroll", "lora")

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_pretrained(
    path: Path | str, *, dtype: DType = "float32", mesh: Mesh | None = None, lora: Lora | None = None
) -> Pretrained:
    """A model to start from: description, parameters on their devices, and its tokenizer where there is one.

    `path` is a Hugging Face folder (config.json and safetensors), a folder of PEFT (a LoRA adapter, which is folded
    into the base that it names), a .gguf file, the workdir of a run of ours (its last policy) or a stage's folder in
    it, or a name on the Hugging Face hub where `huggingface_hub` is installed. What
    scores a sequence (…ForSequenceClassification with one label, a stage that made a reward model) has the parameters
    {"trunk", "head"}. `dtype` is that of the parameters; those of norms are float32. They lie as training wants them
    on the mesh, or on the first device. With `lora` fresh adapters are among them, which change nothing yet, and the
    kernels below them are stored as `lora.base` says.

    Raises UserError that names the file and the field or tensor for whatever is wrong with it.
    """
    if dtype not in DTYPES:
        raise UserError(f"load_pretrained: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    path = Path(path)
    if path.is_file():
        _check_gguf(path)
        from rlhf_jax.interop.gguf_io import load_gguf  # it needs a package of the extra "gguf"

        return _adapted(load_gguf(path, dtype=dtype, mesh=mesh, lora=lora), lora, mesh)
    folder = _folder(path, configs_only=False)
    stage = runs.find_stage(folder)
    if stage is not None:
        return _adapted(runs.load_stage(*stage, CLASSES, dtype=dtype, mesh=mesh), lora, mesh)
    if is_adapter(folder):
        spec, params = load_adapter(folder, _base_folder(folder, configs_only=False), dtype=dtype, mesh=mesh)
    else:
        spec, params = load_folder(folder, dtype=dtype, mesh=mesh, lora=lora)
    return _adapted(Pretrained(spec, params, _tokenizer(folder)), lora, mesh)


def _adapted(loaded: Pretrained, lora: Lora | None, mesh: Mesh | None) -> Pretrained:
    """The same model with fresh adapters, which change nothing yet, its kernels stored as `lora.base` says."""
    if lora is None:
        return loaded
    if "trunk" in loaded.params:
        raise UserError("load_pretrained: lora: this is a reward model; adapters are for language models")
    spec, mesh = replace(loaded.spec, lora=lora), mesh or sharding.single_device_mesh()

    def adapters(key: Key) -> Params:
        return adaptation.own(spec, models.init(spec, key))

    key = jax.random.key(0)
    layout = sharding.shardings(mesh, jax.eval_shape(adapters, key))
    fresh = jax.jit(lambda key: sharding.unbox(adapters(key)), out_shardings=layout)(key)
    boxed = adaptation.base(spec, jax.eval_shape(partial(models.init, spec), key))
    base = quantized.store(spec, adaptation.base(spec, loaded.params), boxed, mesh)
    return replace(loaded, spec=spec, params=adaptation.merge(base, fresh))


@dataclass(frozen=True)
class FromPretrained:
    """A pretrained model by its path or name, see `load_pretrained`."""

    path: str
    """A Hugging Face folder, one of PEFT, a .gguf file, a run's workdir or stage, or a name on the hub."""
    dtype: DType = "float32"
    """Type in which parameters are loaded, and held where none trains them; those of norms are float32. What trains has
    its optimiser's `master` type."""
    compute: DType = "float32"
    """Type of matrix products; norms, softmax, logits and losses stay in float32."""
    attention: Attention = "xla"
    """What computes attention over whole rows: xla, anywhere; cudnn, on NVIDIA GPUs; splash, on TPUs. See
    `ModelSpec.attention`."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, whole blocks, or all but the matrix products."""
    unroll: int = 1
    """How many blocks the loop over layers unrolls."""
    lora: Lora | None = None
    """Adapters, which alone are trained, over the frozen model; none: all weights are trained."""
    architecture: ModelSpec | None = None
    """The shape that the model has, so that the config is complete where its files are not; none: as these say."""
    load_balance: float | None = None
    """Weight of the experts' load-balance loss, which no file holds; none: 0, or as in the run that made the model."""

    @property
    def spec(self) -> ModelSpec:
        """Shape from `architecture` or the model's own description, no weights; numerics from the fields here."""
        spec = self._described() if self.architecture is None else self.architecture
        if self.load_balance is not None:
            if spec.experts is None:
                raise UserError(f"model.load_balance: {self.path} has no experts; leave it None")
            spec = replace(spec, experts=replace(spec.experts, balance_coef=self.load_balance))
        try:
            return replace(
                spec,
                dtype=self.compute,
                attention=self.attention,
                remat=self.remat,
                unroll=self.unroll,
                lora=self.lora,
            )
        except ValueError as error:  # adapters that this model has no place for, a kernel that cannot serve it
            raise UserError(f"{self.path}: {error}") from None

    @property
    def hugging_face(self) -> str | None:
        """The folder or hub name by which transformers loads the same model; None for what is not of its kind."""
        path = Path(self.path)
        if not path.exists():
            return self.path
        whole = path.is_dir() and not is_adapter(path) and runs.find_stage(path) is None
        return str(path.resolve()) if whole else None

    def load(self, *, data: Data, workdir: Path, seed: int, mesh: Mesh | None = None) -> Pretrained:
        """Parameters and tokenizer as the files have them; UserError where they are not of the `architecture`."""
        if self.architecture is not None:
            _check_architecture(self.path, self.architecture, self._described())
        loaded = load_pretrained(self.path, dtype=self.dtype, mesh=mesh, lora=self.lora)
        if "trunk" in loaded.params:
            raise UserError(f"model.path: {self.path} is a reward model; an experiment starts from a language model")
        return replace(loaded, spec=self.spec)

    def tokenizer(self, workdir: Path) -> Tokenizer | None:
        """The tokenizer alone; None where the files hold none."""
        path = Path(self.path)
        if path.is_file():
            _check_gguf(path)
            from rlhf_jax.interop.gguf_io import gguf_tokenizer

            return gguf_tokenizer(path)
        folder = _folder(path, configs_only=False)
        stage = runs.find_stage(folder)
        return _tokenizer(folder) if stage is None else runs.stage_model(stage[0], CLASSES).tokenizer(stage[0])

    def _described(self) -> ModelSpec:
        path = Path(self.path)
        if path.is_file():
            _check_gguf(path)
            from rlhf_jax.interop.gguf_io import gguf_spec

            return gguf_spec(path)
        folder = _folder(path, configs_only=True)
        stage = runs.find_stage(folder)
        if stage is None:
            return folder_spec(_base_folder(folder, configs_only=True) if is_adapter(folder) else folder)
        return replace(runs.stage_model(stage[0], CLASSES).spec, lora=None)


def _check_architecture(path: str, told: ModelSpec, found: ModelSpec) -> None:
    for one in fields(ModelSpec):
        if one.name not in _NUMERICS and vars(told)[one.name] != vars(found)[one.name]:
            raise UserError(
                f"model.architecture.{one.name} is {vars(told)[one.name]}, but {path} has {vars(found)[one.name]}"
            )


CLASSES = {cls.__name__: cls for cls in (Bundled, Scratch, FromPretrained)}
"""What a run's config.json may name as its model."""


def _base_folder(adapter: Path, *, configs_only: bool) -> Path:
    """The folder of the model that an adapter belongs to, which may be on the hub."""
    name, where = adapter_base(adapter), f"{adapter / ADAPTER}: base_model_name_or_path"
    try:
        base = _folder(Path(name), configs_only=configs_only)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if is_adapter(base):
        raise UserError(f"{where}: {base} holds an adapter, no whole model")
    return base


def _tokenizer(folder: Path) -> Tokenizer | None:
    """A folder's tokenizer, or, where an adapter comes without one, its base's."""
    own = load_tokenizer(folder)
    return load_tokenizer(_base_folder(folder, configs_only=False)) if own is None and is_adapter(folder) else own


def _folder(path: Path, *, configs_only: bool) -> Path:
    """The folder itself, or that of a name on the hub, fetched or from the cache."""
    if path.is_dir():
        if not (path / CONFIG).is_file() and not (path / "params").is_dir() and not is_adapter(path):
            raise UserError(f"{path}: no {CONFIG} in this folder, so no model that can be read")
        return path
    name = path.as_posix()
    if path.is_absolute() or not _HUB_NAME.fullmatch(name) or name.endswith((".gguf", ".safetensors")):
        raise UserError(f"{path}: no such file or folder")
    return _from_hub(name, ("*.json",) if configs_only else _FILES)


@functools.cache
def _from_hub(name: str, patterns: tuple[str, ...]) -> Path:
    """The folder in the hub's cache, asked for once in a process: a config's spec is looked at many times."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    except ImportError:
        raise UserError(
            f'{name}: no such folder; to look it up on the hub, install huggingface_hub (the extra "hf")'
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: no such folder, and not to be had from the hub: {reason}") from None


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: no GGUF file; a Hugging Face model is named by its folder")
