import dataclasses
import functools
import json
from dataclasses import dataclass, replace
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import inference, models, sharding
from rlhf_jax.algorithms import reward_model, sft
from rlhf_jax.checkpoint import save_params
from rlhf_jax.config import Experiment, to_dict
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import UserError
from rlhf_jax.interop import FromPretrained, Pretrained, export, load_pretrained
from rlhf_jax.interop.pretrained import TOKENIZER_FILE
from rlhf_jax.interop.tokenizers import SentencePiece
from rlhf_jax.models import ModelSpec, lora
from rlhf_jax.models.spec import Lora
from rlhf_jax.sampling import Sampling

SPEC = ModelSpec(vocab_size=4096, d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=8, max_len=64)
PAIRS = [
    {"prompt": "The film", "chosen": " is a delight.", "rejected": " is a bore."},
    {"prompt": "", "chosen": "Lovely!", "rejected": "Dreadful, and far too long."},
    {"prompt": "I", "chosen": " loved every minute of it", "rejected": " slept."},
    {"prompt": "Oh " * 60, "chosen": " no", "rejected": " yes"},
]


def params(init, seed, spec=SPEC):
    """Random parameters without compiling anything."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: sharding.unbox(init(spec, jax.random.key(0))))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@dataclass(frozen=True)
class Tiny:
    """A tiny model with the package's tokenizer."""

    @property
    def spec(self) -> ModelSpec:
        return SPEC

    def load(self, *, data, workdir, seed, mesh=None) -> Pretrained:
        model = resources.files("rlhf_jax") / "bundled" / TOKENIZER_FILE
        return Pretrained(SPEC, params(models.init, seed), SentencePiece(model.read_bytes()))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose stages were never trained: a policy, a reward model, and a policy that is not finished."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    stages = {"sft": sft.Config(row_length=64), "reward_model": reward_model.Config(), "sft2": sft.Config(init="sft")}
    experiment = Experiment(Tiny(), MovieReviews(), stages, seed=3)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"experiment": to_dict(experiment)}))
    save_params(folder / "sft" / "params", params(models.init, 1))
    save_params(folder / "reward_model" / "params", params(models.init_with_head, 2))
    return folder


@pytest.fixture(scope="module")
def run(workdir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "MODELS", (Tiny,))
        yield inference.open_run(workdir)


@pytest.fixture
def write(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@functools.partial(jax.jit, static_argnums=0)
def read(function, params, tokens, length):
    """A network's output for one row, padded to the model's context."""
    mask = jnp.arange(SPEC.max_len) < length
    return function(SPEC, params, tokens[None], mask[None])[0]


def padded(tokens):
    return jnp.asarray(tokens + [0] * (SPEC.max_len - len(tokens))), len(tokens)


def taught_by(run, loss, **fields):
    """The run as if another loss had taught its reward model."""
    length = run.stages["reward_model"].length
    config = reward_model.Config(loss=loss, pairs=Jsonl("rows.jsonl"), length=length, **fields)
    return replace(run, stages={**run.stages, "reward_model": config})


def score_of(run, prompt: str, text: str) -> float:
    """The reward model's score of a row that fits."""
    tokenizer = run.context.tokenizer
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt), *tokenizer.encode(text), tokenizer.eos_id]
    return float(read(models.score, run.context.head_params("reward_model"), *padded(tokens)))


class TestOpen:
    def test_finished_stages(self, run):
        assert list(run.stages) == ["sft", "reward_model"]
        assert run.context.seed == 3
        assert run.pick(None, "policy") == "sft"
        assert run.pick("base", "policy") == "base"
        assert run.pick(None, "reward") == "reward_model"

    def test_no_such_stage(self, run, workdir):
        assert refused(run.pick, "ppo", "policy") == (
            f"{workdir}: --stage ppo: no finished stage of that name made a policy; there are: base, sft"
        )
        assert "made a reward; there are: reward_model" in refused(run.pick, "sft", "reward")

    def test_no_run(self, tmp_path):
        assert "no run (there is no config.json in it), and not 'bundled'" in refused(inference.open_run, tmp_path)
        (tmp_path / "config.json").write_text('{"experiment": {}')
        assert "config.json is damaged" in refused(inference.open_run, tmp_path)
        (tmp_path / "config.json").write_text("{}")
        assert "config.json is damaged: KeyError 'experiment'" in refused(inference.open_run, tmp_path)


class TestSample:
    def sample(self, run, **changes):
        given = {"stage": None, "n": 3, "max_tokens": 6, "sampling": Sampling(), "seed": 0} | changes
        return inference.sample(run, "This film", **given)

    def test_n_different_completions_that_the_seed_fixes(self, run):
        result = self.sample(run)
        assert (result["prompt"], result["stage"]) == ("This film", "sft")
        assert len({one["text"] for one in result["completions"]}) == 3
        assert all(1 <= one["tokens"] <= 6 for one in result["completions"])
        assert self.sample(run) == result
        assert self.sample(run, seed=1) != result

    def test_cold_samples_are_the_most_probable_tokens(self, run):
        tokenizer, trained = run.context.tokenizer, run.context.policy_params("sft")
        tokens = [tokenizer.bos_id, *tokenizer.encode("This film")]
        start = len(tokens)
        for _ in range(4):
            tokens.append(int(read(models.logits, trained, *padded(tokens))[len(tokens) - 1].argmax()))
        (one,) = self.sample(run, n=1, max_tokens=4, sampling=Sampling(temperature=1e-4))["completions"]
        assert one["text"] == tokenizer.decode(tokens[start:])

    def test_stages_differ(self, run):
        assert self.sample(run, stage="base")["completions"] != self.sample(run)["completions"]

    def test_too_long(self, run):
        assert "--prompt has 3 tokens (with BOS) and --max_tokens is 62: more than the model's context, 64" in refused(
            self.sample, run, max_tokens=62
        )


class TestScore:
    def test_pairs(self, run, write):
        result = inference.score(run, write(PAIRS[:3]), stage=None)
        chosen, rejected = ([score_of(run, p["prompt"], p[key]) for p in PAIRS[:3]] for key in ("chosen", "rejected"))
        margins = np.subtract(chosen, rejected)
        assert list(result) == ["n", "accuracy", "interval", "mean_margin", "cut", "dropped", "stage"]
        assert (result["n"], result["cut"], result["dropped"], result["stage"]) == (3, 0, 0, "reward_model")
        assert result["accuracy"] == pytest.approx(np.mean(margins > 0))
        assert result["mean_margin"] == pytest.approx(np.mean(margins), abs=1e-5)
        low, high = result["interval"]
        assert 0 <= low <= result["accuracy"] <= high <= 1
        json.dumps(result)

    def test_rows_that_are_too_long_are_cut_and_counted(self, run, write):
        long = {"prompt": "", "chosen": "word " * 100, "rejected": "short"}
        assert inference.score(run, write([*PAIRS, long]), stage=None)["cut"] == 2

    def test_transcripts_without_an_answer_are_dropped_and_counted(self, run, write):
        talk = "\n\nHuman: It was\n\nAssistant:"
        unanswered, pair = (
            {"chosen": f"{talk} good", "rejected": talk},
            {"chosen": f"{talk} A", "rejected": f"{talk} B"},
        )
        result = inference.score(run, write([unanswered, pair, unanswered]), stage=None)
        assert (result["n"], result["dropped"]) == (1, 2)
        assert "no transcript has an answer to compare" in refused(
            inference.score, run, write([unanswered]), stage=None
        )

    def test_texts_with_scores(self, run, write):
        texts = ["Lovely!", "A bore.", "It is a film", "I slept through most of it"]
        targets = [3, 1, 2, 1]
        scores = [score_of(run, "", text) for text in texts]
        won = [scores[i] > scores[j] for i in range(4) for j in range(4) if targets[i] > targets[j]]
        rows = [{"text": text, "score": target} for text, target in zip(texts, targets, strict=True)]
        result = inference.score(run, write(rows), stage="reward_model")
        assert (result["n"], result["accuracy"]) == (5, pytest.approx(np.mean(won)))

    def test_ratings(self, run, write):
        texts, ratings = [" is a delight.", " is a bore.", " is long."], [4.0, 1.0, 2.5]
        rows = [{"question": "The film", "completion": t, "rating": r} for t, r in zip(texts, ratings, strict=True)]
        result = inference.score(run, write(rows), stage=None, fields={"prompt": "question"})
        scores = np.asarray([score_of(run, "The film", text) for text in texts])
        assert (result["n"], result["cut"], result["stage"]) == (3, 0, "reward_model")
        assert not any(name.startswith("rmse") for name in result)  # Bradley-Terry's scores are in no rating's unit
        assert result["correlation"] == pytest.approx(np.corrcoef(scores, ratings)[0, 1], abs=1e-4)
        json.dumps(result)

    def test_labels(self, run, write):
        texts, labels = [" is a delight.", " is a bore.", " is long.", " ends"], [True, False, False, True]
        rows = [{"prompt": "A film", "completion": t, "label": y} for t, y in zip(texts, labels, strict=True)]
        result = inference.score(run, write(rows), stage=None)
        scores = np.asarray([score_of(run, "A film", text) for text in texts])
        won = [(a > b) + (a == b) / 2 for a in scores[[0, 3]] for b in scores[[1, 2]]]
        assert "accuracy" not in result and "log_loss" not in result  # nor are they logits
        taught = inference.score(taught_by(run, "outcome_bce"), write(rows), stage=None)
        assert taught["accuracy"] == pytest.approx(np.mean((scores > 0) == labels))
        assert result["auc"] == taught["auc"] == pytest.approx(np.mean(won))

    def test_steps(self, run, write):
        """A solution of one step is a completion after its prompt's line."""
        rows = [{"prompt": "1 + 1", "completions": [a, b], "labels": [True, y]}
                for a, b, y in (("It is", "2", True), ("It may be", "3", False), ("So", "4", False))]  # fmt: skip
        assert not {"accuracy", "log_loss"} & set(inference.score(run, write(rows), stage=None))
        run = taught_by(run, "process_bce")
        result = inference.score(run, write(rows), stage=None)
        assert result["n"] == 6 and {"accuracy", "auc", "log_loss"} <= set(result)
        single = [{"prompt": "1 + 1", "completions": [b], "labels": [y]} for b, y in (("2", True), ("3", False))]
        found = inference.score(run, write(single), stage=None)
        scores = np.asarray([score_of(run, "1 + 1\n", b) for b in "23"])
        assert found["accuracy"] == pytest.approx(np.mean((scores > 0) == [True, False]))
        assert found["log_loss"] == pytest.approx(np.mean(np.logaddexp(0, [-scores[0], scores[1]])), abs=1e-4)

    def test_a_neutral_step_is_what_the_stage_says(self, run, write):
        rows = [{"prompt": "1 + 1", "completions": [b], "ratings": [y]} for b, y in (("2", 1), ("3", 0), ("4", -1))]
        auc = {}
        for neutral in ("right", "wrong"):
            found = inference.score(taught_by(run, "process_bce", neutral=neutral), write(rows), stage=None)
            scores = [score_of(run, "1 + 1\n", b) for b in "234"]
            right = scores[:2] if neutral == "right" else scores[:1]
            pairs = [(a > b) + (a == b) / 2 for a in right for b in scores[len(right) :]]
            auc[neutral] = np.mean(pairs)
            assert found["auc"] == pytest.approx(auc[neutral])

    def test_rows_of_another_kind(self, run, write):
        rated = {"prompt": "p", "completion": "c", "rating": 1}
        assert "rows.jsonl, line 2: no field 'rating'" in refused(
            inference.score, run, write([rated, {"prompt": "p", "completion": "c", "label": True}]), stage=None
        )
        message = refused(inference.score, run, write([{"prompt": "p", "completion": "c"}]), stage=None)
        assert "rows.jsonl, line 1: expected 'prompt', 'chosen' and 'rejected'" in message and "'rating'" in message
        assert "all 1: there is nothing to tell apart" in refused(
            inference.score, run, write([rated, {**rated, "completion": "d"}]), stage=None
        )

    def test_bad_rows(self, run, write):
        assert "rows.jsonl, line 2: 'chosen' is empty" in refused(
            inference.score, run, write([PAIRS[0], {**PAIRS[0], "chosen": ""}]), stage=None
        )
        assert "no rows" in refused(inference.score, run, write([]), stage=None)
        same = [{"text": text, "score": 1} for text in "ab"]
        assert "rows.jsonl: all targets are equal" in refused(inference.score, run, write(same), stage=None)


def test_bundled_is_the_model_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = inference.open_run(inference.Path("bundled"))
    assert run.pick(None, "policy") == "base"
    assert "there is none" in refused(run.pick, None, "reward")


class TestExport:
    def test_the_last_policy_by_default(self, run, tmp_path):
        assert inference.export_stage(run, tmp_path / "out", stage=None, dtype="float32") == ("sft", None)
        loaded = load_pretrained(tmp_path / "out")
        np.testing.assert_array_equal(
            loaded.params["layers"]["mlp"]["up"], params(models.init, 1)["layers"]["mlp"]["up"]
        )
        assert loaded.tokenizer.encode("a film") == run.context.tokenizer.encode("a film")

    def test_a_reward_model_by_name(self, run, tmp_path):
        name, note = inference.export_stage(run, tmp_path / "out", stage="reward_model", dtype="bfloat16")
        assert name == "reward_model" and "bias" in note
        assert set(load_pretrained(tmp_path / "out").params) == {"trunk", "head"}
        assert refused(inference.open_scored, tmp_path / "out") == (
            f"{tmp_path / 'out'}: score takes the folder of a run, whose config.json says how long its reward model's "
            "rows are and what it learnt; an exported model's does not: name the run that it was exported from"
        )

    def test_what_cannot_be_exported_leaves_nothing(self, run, tmp_path):
        message = refused(inference.export_stage, run, tmp_path / "out", stage="sft2", dtype="float32")
        assert "--stage sft2: no finished stage of that name made a policy; there are: base, sft" in message
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("mine")
        assert "not an empty folder" in refused(
            inference.export_stage, run, tmp_path / "mine", stage="sft", dtype="float32"
        )
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "notes.txt"]

    def test_adapters_alone_or_merged(self, tmp_path, monkeypatch):
        """Both folders are the same model; the adapters' own names its base, which transformers can load."""
        monkeypatch.setattr(inference, "MODELS", (FromPretrained,))
        base, folder = tmp_path / "base", tmp_path / "run"
        plain = dataclasses.replace(SPEC, scale_embedding=False)
        tokenizer = SentencePiece((resources.files("rlhf_jax") / "bundled" / TOKENIZER_FILE).read_bytes())
        export(Pretrained(plain, params(models.init, 3), tokenizer), base)
        model = FromPretrained(str(base), lora=Lora(rank=2, targets=("query", "down")))
        stages = {"sft": sft.Config(row_length=64), "reward_model": reward_model.Config()}
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps({"experiment": to_dict(Experiment(model, MovieReviews(), stages))})
        )
        own = lora.own(model.spec, params(models.init, 4, model.spec))
        save_params(folder / "sft" / "params", own)
        save_params(folder / "reward_model" / "params", params(models.init_with_head, 5, model.spec))
        run = inference.open_run(folder)
        for name in ("sft", "reward_model"):
            kind = {"stage": name, "dtype": "float32"}
            inference.export_stage(run, tmp_path / name, **kind)
            inference.export_stage(run, tmp_path / f"{name}-adapter", **kind, adapter=True)
            merged, over = (load_pretrained(tmp_path / folder) for folder in (name, f"{name}-adapter"))
            assert merged.spec == over.spec and over.tokenizer.encode("a film") == tokenizer.encode("a film")
            trees = [{**x.params, "head": x.params.get("head", {}) | {"bias": 0}} for x in (merged, over)]
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *trees)
        written = json.loads((tmp_path / "sft-adapter" / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(base)
        message = refused(inference.export_stage, run, tmp_path / "no", stage="base", dtype="float32", adapter=True)
        assert "--adapter: base is the model without adapters" in message and not (tmp_path / "no").exists()

    def test_adapters_of_a_run_that_has_none(self, run, tmp_path):
        message = refused(inference.export_stage, run, tmp_path / "out", stage="sft", dtype="float32", adapter=True)
        assert "this model has no adapters, all its weights were trained" in message
        assert list(tmp_path.iterdir()) == []
