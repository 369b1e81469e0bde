"""What `load_pretrained` reads besides the plainest folder: into a mesh, older spellings, runs, the hub's cache."""

import dataclasses
import json
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.checkpoint import save_params
from rlhf_jax.config import Experiment, from_dict, ill_typed, to_dict
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.digests import write_sealed
from rlhf_jax.errors import UserError
from rlhf_jax.interop import FromPretrained, Pretrained, Scratch, export, hf_folder, load_pretrained
from rlhf_jax.interop.families import FAMILIES, Fields, layout
from rlhf_jax.interop.hf_folder import folder_spec
from rlhf_jax.interop.pretrained import TOKENIZER_FILE, Bundled
from rlhf_jax.models.spec import Lora, ModelSpec
from rlhf_jax.sharding import MeshConfig, make_mesh
from tests.interop.folders import change_config, read_config, weights, write_case, write_tensors
from tests.interop.test_export import random_params
from tests.oracles_hf.weights import read, tokens

CASES = read()
SPEC = ModelSpec(vocab_size=40, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16, max_len=32,
                 qk_norm=True)  # fmt: skip


def same(a, b, atol=0.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=atol, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_configs_of_transformers_4_and_5_say_the_same(case, tmp_path):
    new = write_case(tmp_path / case, CASES[case])
    old = write_case(tmp_path / "old", CASES[case], config="config_4", name=case)
    if read_config(new)["model_type"] != "gpt2":
        assert "rope_parameters" in read_config(new) and "rope_parameters" not in read_config(old)
    assert folder_spec(new) == folder_spec(old)


def test_windows_are_what_transformers_means_by_them(tmp_path):
    """The golden logits of windows 1, 3, 4 and 5 hold this by number; these are the fields."""
    specs = {case: folder_spec(write_case(tmp_path / case, CASES[case])) for case in CASES}
    assert (specs["mistral-c"].window, specs["mistral-b"].window) == (1, None)
    assert (specs["qwen2-b"].window, specs["qwen2-b"].local_layers) == (3, (False, True, True))
    assert (specs["gemma2-a"].window, specs["gemma2-a"].local_layers) == (4, (True, False, True))
    assert (specs["gemma3_text-b"].local_rope_theta, specs["gemma3_text-c"].window) == (100.0, None)


@pytest.mark.parametrize(
    ("case", "from_prefix", "to_prefix"),
    [("gpt2-a", "transformer.", ""), ("llama-a", "model.", ""), ("gpt_neox-a", "embed_out.", "lm_head.")],
)
def test_other_spellings_of_names(tmp_path, case, from_prefix, to_prefix):
    folder = write_case(tmp_path / case, CASES[case])
    expected = load_pretrained(folder).params
    renamed = {
        to_prefix + n.removeprefix(from_prefix) if n.startswith(from_prefix) else n: x
        for n, x in weights(case, CASES[case]).items()
    }
    extra = {"gpt2-a": "h.0.attn.bias", "llama-a": "layers.0.self_attn.rotary_emb.inv_freq"}
    if case in extra:  # what older versions of transformers kept beside the parameters
        renamed[extra[case]] = np.zeros((1, 2), np.float32)
    write_tensors(folder / "model.safetensors", renamed)
    same(load_pretrained(folder).params, expected)


def test_the_language_part_of_a_gemma_3_that_reads_images(tmp_path):
    folder = write_case(tmp_path / "gemma3_text-a", CASES["gemma3_text-a"])
    alone = load_pretrained(folder)
    inside = {f"language_model.{n}": x for n, x in weights("gemma3_text-a", CASES["gemma3_text-a"]).items()}
    inside["vision_tower.vision_model.embeddings.position_embedding.weight"] = np.zeros((2, 2), np.float32)
    text = read_config(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    write_tensors(folder / "model.safetensors", inside)
    both = load_pretrained(folder)
    assert both.spec == alone.spec
    same(both.params, alone.params)


@pytest.mark.parametrize("stored", ["F16", "BF16", "F64"])
def test_types_of_weights(tmp_path, stored):
    folder = write_case(tmp_path / "gemma-a", CASES["gemma-a"])
    expected = load_pretrained(folder).params
    write_case(folder, CASES["gemma-a"], dtype=stored)
    same(load_pretrained(folder).params, expected, atol=0.02 if stored == "BF16" else 0)
    small = load_pretrained(folder, dtype="bfloat16").params
    kinds = {jax.tree_util.keystr(p, simple=True, separator="/"): x.dtype for p, x in jax.tree.leaves_with_path(small)}
    assert all(kind == (jnp.float32 if "norm/" in path else jnp.bfloat16) for path, kind in kinds.items())
    assert {str(kind) for kind in kinds.values()} == {"float32", "bfloat16"}


@pytest.mark.parametrize("case", ["gpt2-b", "gpt_neox-a", "qwen3-a", "mixtral-b"])
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=4, tensor=1, expert=2)])
def test_parameters_are_read_into_the_shards_of_a_mesh(tmp_path, case, mesh):
    folder = write_case(tmp_path / case, CASES[case])
    change = {"gpt2-b": {}}.get(case, {})
    change_config(folder, **change)
    on_mesh, spec = make_mesh(mesh), folder_spec(folder)
    boxed = jax.eval_shape(lambda: models.init(spec, jax.random.key(0)))
    alone = load_pretrained(folder).params
    try:
        wanted = sharding.shardings(on_mesh, boxed)
    except UserError:  # an odd vocabulary does not divide by tensor = 2: the same error, and nothing read
        with pytest.raises(UserError, match="does not divide"):
            load_pretrained(folder, mesh=on_mesh)
        return
    spread = load_pretrained(folder, mesh=on_mesh).params
    assert jax.tree.map(lambda x: x.sharding, spread) == wanted
    same(spread, alone)


def test_layouts_are_what_they_say():
    assert layout("d (3 n h) -> d n h").stored({"d": 4, "n": 2, "h": 3}) == (4, 18)
    assert layout("(n 3 h) d -> d n h").split({"d": 4, "n": 2, "h": 3}) == (2, 3, 3, 4)
    x = np.arange(24.0).reshape(6, 4)
    (there,) = (layout("(n h) d -> d n h").pack([x.reshape(2, 3, 4).transpose(2, 0, 1)], {"n": 2, "h": 3, "d": 4}),)
    np.testing.assert_array_equal(there, x)


def test_every_family_stands_under_its_own_name():
    assert {name: family.model_type for name, family in FAMILIES.items()} == {name: name for name in FAMILIES}
    with pytest.raises(UserError, match=r"config\.json: hidden_size"):
        FAMILIES["llama"].spec(Fields({}, Path("config.json")))


class TestHostMemory:
    """Beyond the parameters the host holds at most 1.2 times the largest group that is read at once.

    On a CPU the pages in which a parameter is put together become the parameter; all else that is allocated meanwhile
    is Python's and NumPy's, which tracemalloc counts. So nothing here depends on what else the machine does.
    """

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("stored", ["F32", "BF16"])
    def test_beyond_the_parameters(self, tmp_path, monkeypatch, dtype, stored):
        folder, made = self.large(tmp_path, stored), []

        def scratch(shape, dtype):
            array = make(shape, dtype)
            made.append((array.ctypes.data, array.nbytes))
            return array

        make = hf_folder._scratch
        monkeypatch.setattr(hf_folder, "_scratch", scratch)
        load_pretrained(folder, dtype=dtype)  # what is imported and traced on the way is not what is measured
        made.clear()
        tracemalloc.start()
        try:
            params = load_pretrained(folder, dtype=dtype).params
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        leaves = jax.tree.leaves(params)
        largest = max(leaf.nbytes for leaf in leaves)
        kept = {leaf.unsafe_buffer_pointer() for leaf in leaves}
        copied = max((size for address, size in made if address not in kept), default=0)
        assert len(made) == len(leaves) and sum(size for _, size in made) == sum(leaf.nbytes for leaf in leaves)
        assert largest > 8_000_000 > 100 * copied  # few small ones, such as norms, are copied by the runtime
        assert peak + copied <= 1.2 * largest, (peak, copied, largest)
        assert peak < 3_000_000  # as pieces of a megabyte are what is read at once

    def large(self, folder, stored):
        """A folder of a Llama of 20 million parameters, most of them in few tensors."""
        config = CASES["llama-a"]["config"] | {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048}
        config |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        shapes = {"embed_tokens": (8192, 512), "lm_head": (8192, 512), "norm": (512,), "layernorm": (512,)}
        shapes |= {"mlp.gate_proj": (2048, 512), "mlp.up_proj": (2048, 512), "down_proj": (512, 2048)}
        names = [f"model.layers.{i}.{part}" for i in range(4) for part in self.parts()]
        names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
        found = {n: next((s for part, s in shapes.items() if f"{part}.weight" in n), (512, 512)) for n in names}
        tensors = {n: np.ones(shape, np.float32) for n, shape in found.items()}
        write_tensors(folder / "model.safetensors", tensors, stored)
        return folder

    def parts(self):
        norms = [f"{name}_layernorm.weight" for name in ("input", "post_attention")]
        attention = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
        return [*norms, *attention, *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a policy, a reward model and a stage that is not finished."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    architecture = dataclasses.replace(SPEC, window=3, local_layers=(True, False))
    experiment = Experiment(Scratch(architecture), MovieReviews(), {}, seed=3)
    plain = to_dict(experiment) | {"stages": {"sft": {}, "ppo": {}, "reward_model": {}, "later": {}}}
    (folder / "config.json").write_text(json.dumps({"experiment": plain}))
    write_sealed(folder / TOKENIZER_FILE, Bundled().tokenizer(folder).model)
    for name in ("sft", "ppo"):
        save_params(folder / name / "params", random_params(models.init, architecture, name))
    save_params(folder / "reward_model" / "params", random_params(models.init_with_head, architecture, "reward"))
    return folder


class TestRuns:
    def test_a_run_is_its_last_finished_policy(self, workdir):
        loaded = load_pretrained(workdir)
        assert loaded.spec == dataclasses.replace(SPEC, window=3, local_layers=(True, False))
        same(loaded.params, random_params(models.init, loaded.spec, "ppo"))
        assert loaded.tokenizer.eos_id == 3

    def test_a_stage_by_its_folder(self, workdir):
        policy, reward = (load_pretrained(workdir / stage) for stage in ("sft", "reward_model"))
        assert set(reward.params) == {"trunk", "head"} and policy.spec == reward.spec
        same(policy.params, random_params(models.init, policy.spec, "sft"))
        same(reward.params, random_params(models.init_with_head, reward.spec, "reward"))

    def test_in_bfloat16_on_a_mesh(self, workdir):
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        params = load_pretrained(workdir, dtype="bfloat16", mesh=mesh).params
        assert params["layers"]["mlp"]["up"].dtype == jnp.bfloat16
        assert len(params["layers"]["mlp"]["up"].sharding.device_set) == 8

    def test_adapters_are_folded(self, workdir, tmp_path, monkeypatch):
        spec = dataclasses.replace(SPEC, lora=Lora(rank=2))
        experiment = Experiment(Scratch(spec), MovieReviews(), {}, seed=5)
        plain = to_dict(experiment) | {"stages": {"ppo": {}}}
        (tmp_path / "config.json").write_text(json.dumps({"experiment": plain}))
        write_sealed(tmp_path / TOKENIZER_FILE, (workdir / TOKENIZER_FILE).read_bytes())
        whole = random_params(models.init, spec, "adapters")
        base = random_params(models.init, spec, "base")
        monkeypatch.setattr(Scratch, "load", lambda model, **_: Pretrained(spec, base, None))
        save_params(tmp_path / "ppo" / "params", models.lora.own(spec, whole))
        loaded = load_pretrained(tmp_path)
        assert loaded.spec == SPEC
        merged = models.lora.fold(spec, models.lora.merge(models.lora.base(spec, base), models.lora.own(spec, whole)))
        same(loaded.params, merged, atol=1e-6)

    @pytest.mark.parametrize(
        "content",
        [
            "{",
            "[]",
            '{"experiment": 3}',
            '{"experiment": {"model": {"class": "os"}}}',
            '{"experiment": {"model": {"class": "Bundled", "more": 1}, "stages": {}}}',
        ],
    )
    def test_a_damaged_config_is_one_line(self, workdir, tmp_path, content):
        folder = tmp_path / "run"
        (folder / "sft").mkdir(parents=True)
        (folder / "sft" / "params").symlink_to(workdir / "sft" / "params")
        (folder / "config.json").write_text(content)
        for path in (folder, folder / "sft"):
            with pytest.raises(UserError) as caught:
                load_pretrained(path)
            assert "\n" not in str(caught.value) and str(folder) in str(caught.value)

    def test_a_run_without_a_finished_policy(self, workdir, tmp_path):
        (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
        with pytest.raises(UserError, match="no finished stage made a policy"):
            load_pretrained(tmp_path)


class TestFromPretrained:
    def test_the_spec_needs_no_weights(self, tmp_path):
        folder = write_case(tmp_path / "qwen3-a", CASES["qwen3-a"])
        (folder / "model.safetensors").unlink()
        model = FromPretrained(str(folder), dtype="bfloat16", compute="bfloat16", remat="dots", unroll=2)
        plain = folder_spec(folder)
        assert model.spec == dataclasses.replace(plain, dtype="bfloat16", remat="dots", unroll=2)
        with pytest.raises(UserError, match=r"neither model\.safetensors"):
            model.load(data=MovieReviews(), workdir=tmp_path, seed=0)

    def test_is_a_field_of_an_experiment(self, tmp_path):
        folder = write_case(tmp_path / "qwen3-a", CASES["qwen3-a"])
        experiment = Experiment(FromPretrained(str(folder), dtype="bfloat16"), MovieReviews(), {})
        assert list(ill_typed(experiment)) == []
        assert from_dict(to_dict(experiment), [FromPretrained]) == experiment
        loaded = experiment.model.load(data=MovieReviews(), workdir=tmp_path, seed=0)
        assert loaded.spec == experiment.model.spec
        assert loaded.params["embedding"].dtype == jnp.bfloat16

    def test_of_a_run(self, workdir):
        model = FromPretrained(str(workdir / "sft"))
        assert model.spec == dataclasses.replace(SPEC, window=3, local_layers=(True, False))
        assert model.tokenizer(workdir).eos_id == 3


def test_an_exported_folder_has_its_tokenizer(workdir, tmp_path):
    loaded = load_pretrained(workdir)
    export(loaded, tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    assert again.tokenizer.encode("a film") == loaded.tokenizer.encode("a film")
    ids, mask = tokens("run", SPEC.vocab_size)
    found, expected = (models.logits(m.spec, m.params, ids, mask) for m in (again, loaded))
    np.testing.assert_allclose(np.asarray(found)[mask], np.asarray(expected)[mask], atol=1e-5)


class TestTheHub:
    def test_a_name_is_looked_up_in_the_cache_offline(self, tmp_path, monkeypatch):
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        repo = tmp_path / "models--someone--llama-a"
        write_case(repo / "snapshots" / "0123", CASES["llama-a"], name="llama-a")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0123")
        expected = load_pretrained(repo / "snapshots" / "0123")
        loaded = load_pretrained("someone/llama-a")
        assert loaded.spec == expected.spec == FromPretrained("someone/llama-a").spec
        same(loaded.params, expected.params)
        with pytest.raises(UserError, match="someone/other: no such folder, and not to be had from the hub") as caught:
            load_pretrained("someone/other")
        assert "\n" not in str(caught.value)

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(UserError, match="install huggingface_hub"):
            load_pretrained("someone/else")


def test_null_key_value_heads_are_as_many_as_heads_and_missing_ones_the_familys(tmp_path):
    folder = write_case(tmp_path / "mistral-a", CASES["mistral-a"])
    change_config(folder, num_attention_heads=16, num_key_value_heads=None)
    assert folder_spec(folder).n_kv_heads == 16
    change_config(folder, num_key_value_heads=...)
    assert folder_spec(folder).n_kv_heads == 8
