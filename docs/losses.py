"""Write docs/losses.md, the page of losses, from docstrings, signatures, oracles and imports.

python docs/losses.py             # after a docstring, an oracle, a stage or a config has changed
python docs/losses.py --check     # exit code 1 if the page is not what this would write
"""

import ast
import inspect
import os
import re
import sys
import textwrap
from collections import defaultdict
from functools import cache
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.oracles.comparing import numbers  # noqa: E402
from tests.oracles.table import IDENTITIES, ORACLES, public  # noqa: E402

PAGE = ROOT / "docs" / "losses.md"
SECTIONS = (  # in the order of the page
    *("losses.supervised", "losses.reward", "losses.preference", "losses.unpaired"),
    *("losses.policy", "losses.value", "losses.offline", "losses.distillation", "losses.regularizers"),
    *("kl", "advantages", "importance", "normalizer", "logprobs", "masking"),
)
HEAD = """# Losses, one by one

Made by `python docs/losses.py` from the docstrings, signatures, oracles and imports of this repository; a test fails
when it is stale. The docstrings say more: diagnostics, what raises, an example that runs.

`float[*b, t]` is an array of any leading axes and one of tokens, NumPy or JAX; keywords without a type are scalars,
traced or not. What is in `losses` gives `(loss, diagnostics)`, unreduced: a reducer of [masking](#masking) makes it a
number. **Takes** and **gives** say what one number of an array stands for. **Peers** names what gives the same value
and gradient to 1e-6, with its case in `python -m tests.oracles`. **Used by** is read from the code: the stages that
lead to it, whatever a field switches off, and the configs that name it.
"""

SUM, MEAN = "summed over a completion's tokens", "averaged over a completion's tokens"
TOKEN, COMPLETION, PROMPT = "one a token", "one a completion", "one a prompt"
TAKES = {  # what one number of an argument stands for; None: the name says it, or the docstring
    **dict.fromkeys(("logps", "old_logps", "ref_logps", "sampler_logps", "entropy", "kl", "tokens", "actions"), TOKEN),
    **dict.fromkeys(("values", "old_values", "returns", "rewards", "advantages", "targets", "weights", "mask"), TOKEN),
    **dict.fromkeys(("hidden", "ref_hidden", "logits", "ref_logits", "teacher_logits"), "one row a token"),
    **dict.fromkeys(("q_values", "target_q_values"), "one row a token"),
    **dict.fromkeys(("chosen_logratio", "rejected_logratio", "logratios", "mismatched_logratios"), SUM),
    **dict.fromkeys(("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"), SUM),
    **dict.fromkeys(("seq_logps", "old_seq_logps"), SUM),
    **dict.fromkeys(("chosen_mean_logps", "rejected_mean_logps"), MEAN),
    **dict.fromkeys(("scores", "chosen_scores", "rejected_scores", "scores_a", "scores_b"), COMPLETION),
    **dict.fromkeys(("ranked_scores", "greedy_scores", "ranks", "ratings", "labels", "desirable"), COMPLETION),
    **dict.fromkeys(("params", "anchor", "fisher", "unembedding", "ref_unembedding", "thresholds"), None),
    **dict.fromkeys(("x", "where", "margin"), None),
    "best": PROMPT,
}
TAKES_HERE = {
    ("losses.policy.gspo", "advantages"): COMPLETION,
    ("losses.policy.gmpo", "advantages"): COMPLETION,
    ("losses.policy.reinforce", "logps"): f"{TOKEN}, or {SUM}",
    ("losses.policy.reinforce", "advantages"): f"{TOKEN}, or one a completion",
    ("losses.reward.process_bce", "scores"): "one a step",
    ("losses.reward.process_bce", "labels"): "one a step",
    ("normalizer.update", "mask"): COMPLETION,
}
GIVES = {
    **dict.fromkeys(
        ("losses.supervised", "losses.policy", "losses.value", "losses.offline", "losses.distillation"), TOKEN
    ),
    **dict.fromkeys(("kl", "logprobs", "importance"), TOKEN),
    **dict.fromkeys(("losses.preference", "losses.reward.bradley_terry", "losses.reward.centering"), "one a pair"),
    **dict.fromkeys(("losses.policy.p3o",), "one a pair"),
    **dict.fromkeys(("losses.reward.plackett_luce", "losses.reward.k_wise", "losses.reward.best_of_k"), PROMPT),
    **dict.fromkeys(("losses.reward", "losses.unpaired", "losses.policy.gspo", "losses.policy.gmpo"), COMPLETION),
    **dict.fromkeys(("kl.sequence_kl", "logprobs.sequence_logps", "importance.sequence_weights"), "one a sequence"),
    **dict.fromkeys(("advantages", "normalizer"), COMPLETION),
    **dict.fromkeys((f"advantages.{name}" for name in ("gae", "token_rewards", "reinforce_plus_plus")), TOKEN),
    **dict.fromkeys(("losses.regularizers.entropy_bonus", "losses.regularizers.pretraining_mix"), TOKEN),
    **dict.fromkeys(("masking.keep", "masking.whiten", "masking.positions"), TOKEN),
    **dict.fromkeys(("losses.unpaired.kto_kl_baseline", "logprobs.ratio_deviation"), "one a batch"),
    **dict.fromkeys(("masking.masked_mean", "masking.masked_var"), "one a batch"),
    **dict.fromkeys(("masking.token_mean", "masking.sequence_mean"), "one a batch, as total and count"),
    "losses.reward.process_bce": "one a step",
    "losses.offline.perturbed_logits": "one row a token",
    "losses.regularizers.elastic_weight_consolidation": "one for all parameters",
    "losses.regularizers.fisher_diagonal": "one a parameter",
    "masking.fixed_length_mean": "one a batch, as total and count",
    "masking.last_index": "one a row",
    "normalizer.update": "the state",
}

TRL = r'`{}(loss_type="\1")`'
PEER_NAMES = {  # a pattern of cases -> what the peer calls it; the first that fits
    "trl_1_16": {
        r"dpo_(aot_unpaired|aot)_.*": TRL.format("DPOTrainer"),
        r"dpo_sigmoid_(.*(?:kl|divergence))": r'`DPOTrainer(f_divergence_type="\1")`',
        r"dpo_(.*)": TRL.format("DPOTrainer"),
        r"(kto)(?:_negative_kl)?": TRL.format("KTOTrainer"),
        r"(apo_zero_unpaired)": TRL.format("KTOTrainer"),
        r"orpo_odds_ratio": "`ORPOTrainer.odds_ratio_loss`",
        r"cpo_(sigmoid)(?:_smoothed)?": TRL.format("CPOTrainer"),
        r"(simpo)": TRL.format("CPOTrainer"),
        r"alpha_po_.*": '`CPOTrainer(loss_type="simpo", alpha=…)`',
        r"batch_logps_.*": "`CPOTrainer.get_batch_logps`",
        r"reward_centering": "`RewardTrainer(center_rewards_coefficient=…)`",
        r"reward(?:_margin)?": "`RewardTrainer`",
    },
    "trl_1_16_policy": {
        r"grpo_advantages_(.*)": r'`GRPOTrainer(scale_rewards="\1")`',
        r"grpo_kl": "`GRPOTrainer(beta=…)`",
        r"grpo_delta": "`GRPOTrainer(delta=…)`",
        r"grpo_(?:token_advantages|unclipped)": "`GRPOTrainer`",
        r"grpo_(.*)": TRL.format("GRPOTrainer"),
        r"gspo": '`GRPOTrainer(importance_sampling_level="sequence")`',
        r"(cispo)": TRL.format("GRPOTrainer"),
        r"gmpo_.*": "`GMPOTrainer`",
        r"rloo_.*": "`RLOOTrainer`",
        r"sampler_(.*?)(?:_both)?": r'`GRPOTrainer(vllm_importance_sampling_mode="\1")`',
    },
    "trl_1_12": {
        r"ppo_.*": "`PPOTrainer.train`",
        r"(masked_(?:whiten|mean|var)).*": r"`\1`",
        r"prm": "`PRMTrainer`",
        r"bco_.*": "`BCOTrainer.bco_loss`",
        r"gspo_token_.*": '`GRPOTrainer(importance_sampling_level="sequence_token")`',
    },
    "openrlhf": {
        r"policy_loss_gspo": '`PolicyLoss(policy_loss_type="gspo")`',
        r"policy_loss_dual": "`PolicyLoss(dual_clip=…)`",
        r"policy_loss_token_(.*)": r'`PolicyLoss(is_correction_mode="\1")`',
        r"policy_loss_sequences": "`PolicyLoss(token_level_loss=False)`",
        r"policy_loss": "`PolicyLoss`",
        r"value_loss_.*": "`ValueLoss`",
        r"(PairWiseLoss|LogExpLoss)_.*": r"`\1`",
        r"dpo": "`DPOLoss`",
        r"cdpo": "`DPOLoss(label_smoothing=…)`",
        r"ipo": "`DPOLoss(ipo=True)`",
        r"sft_(.*)": r"`SFTLoss(token_level_loss=\1)`",
        r"gpt_lm": "`GPTLMLoss`",
        r"(k[123])": r'`compute_approx_kl(kl_estimator="\1")`',
        r"rewards": "`compute_reward`",
        r"gae_.*": "`get_advantages_and_returns`",
        r"log_probs": "`log_probs_from_logits`",
        r"baseline_(.*)": r'`compute_advantages_and_returns`, estimator "\1"',
        r"whiten": "`compute_advantages_and_returns`",
        r"reinforce_plus_plus_.*": "`get_cumulative_returns`, whitened",
        r"adaptive_kl_.*": "`AdaptiveKLController`",
    },
    "rlax": {
        r"gae": "`truncated_generalized_advantage_estimation`",
        r"clipped_surrogate": "`clipped_surrogate_pg_loss`",
        r"policy_gradient": "`policy_gradient_loss`",
        r"token_logps.*": "`softmax().logprob`",
        r"entropy(?!_loss).*": "`softmax().entropy`",
        r"categorical_kl": "`categorical_kl_divergence`",
        r"best_of_k": "`categorical_cross_entropy`",
        r"sigmoid_log_loss": "`log_loss`",
        r"(lambda_returns|entropy_loss|l2_loss|expectile_loss)": r"`\1`",
    },
    "trlx": {
        r"ilql.*": "`ILQLConfig.loss`",
        r"ppo_loss": "`PPOConfig.loss`",
        r"gae_.*": "`PPOConfig.get_advantages_and_returns`",
        r"whiten_.*": "`whiten`",
        r"logprobs": "`logprobs_of_labels`",
        r"running_moments": "`RunningMoments`",
        r"adaptive_kl": "`AdaptiveKLController`",
    },
    "tfp": {r"plackett_luce": "`PlackettLuce`", r"ordered_logistic": "`OrderedLogistic`"},
}
PEERS = {  # the file of a peer -> (its name, its package)
    **{name: ("TRL", "trl") for name in ("trl_1_16", "trl_1_16_policy", "trl_1_12")},
    "openrlhf": ("OpenRLHF", "openrlhf"),
    "rlax": ("rlax", "rlax"),
    "trlx": ("trlx", "trlx"),
    "tfp": ("TensorFlow Probability", "tfp-nightly"),
}


class Code:
    """The sources of the package and the configs, and what each of their top-level names refers to."""

    def __init__(self):
        files = [*sorted((ROOT / "rlhf_jax").rglob("*.py")), *sorted((ROOT / "configs").glob("*.py"))]
        self.trees = {self.module(path): ast.parse(path.read_text(encoding="utf-8")) for path in files}
        self.imports, self.defined = {}, {}
        for module, tree in self.trees.items():
            self.imports[module] = {
                alias.asname or alias.name: f"{node.module}.{alias.name}"
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            self.defined[module] = {name: node for node in tree.body for name in self.names_of(node)}

    @staticmethod
    def module(path: Path) -> str:
        """The dotted name of a file."""
        return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    @staticmethod
    def names_of(node: ast.stmt) -> list[str]:
        """What a top-level statement defines."""
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return [node.name]
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        return [target.id for target in targets if isinstance(target, ast.Name)]

    def resolve(self, dotted: str) -> tuple[str, str] | None:
        """(module, name) of where a dotted name is defined, through the packages that hand it on."""
        parts = dotted.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module, name = ".".join(parts[:cut]), parts[cut]
            if module not in self.trees or f"{module}.{name}" in self.trees:
                continue
            if name in self.defined[module]:
                return module, name
            if name in self.imports[module]:
                return self.resolve(".".join([self.imports[module][name], *parts[cut + 1 :]]))
            return None
        return None

    def refers_to(self, module: str, node: ast.AST) -> set[tuple[str, str]]:
        """What a piece of a module's code names."""
        found = set()
        for part in ast.walk(node):
            if isinstance(part, (ast.Name, ast.Attribute)):
                first, *rest = ast.unparse(part).split(".")
                target = self.imports[module].get(first, f"{module}.{first}")
                found.add(self.resolve(".".join([target, *rest])))
        return found - {None}

    def reached(self, module: str, stop: set[tuple[str, str]]) -> set[tuple[str, str]]:
        """All names that a module's code leads to; what is in `stop` leads no further."""
        todo, seen = [(module, name) for name in self.defined[module]], set()
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            if at not in stop:
                todo += self.refers_to(at[0], self.defined[at[0]][at[1]])
        return seen


@cache
def code() -> Code:
    """The sources, read once."""
    return Code()


def home(function: str) -> tuple[str, str]:
    """Where a public name is defined."""
    found = code().resolve(f"rlhf_jax.{function}")
    assert found is not None, function
    return found


def uses() -> tuple[dict[tuple[str, str], list[str]], dict[tuple[str, str], list[str]], dict[str, list[str]]]:
    """Function to stages, function to the configs that name it, stage to configs."""
    stages_of, named_in, configs_of = defaultdict(list), defaultdict(list), defaultdict(list)
    terminal = {home(function) for function in public()}
    stages = [m for m, names in code().defined.items() if m.startswith("rlhf_jax.algorithms.") and "Config" in names]
    for stage in stages:
        configs_of[stage.split(".")[-1]] = []
        for at in code().reached(stage, terminal) & terminal:
            stages_of[at].append(stage.split(".")[-1])
    for config in (m for m in code().trees if m.startswith("configs.")):
        named = set().union(*(code().refers_to(config, node) for node in code().trees[config].body))
        for at in named & terminal:
            named_in[at].append(config.split(".")[-1])
        for stage in sorted({m for m, _ in named} & set(stages)):
            configs_of[stage.split(".")[-1]].append(config.split(".")[-1])
    return stages_of, named_in, configs_of


def shape(annotation: ast.expr | None) -> str:
    """`Float[ArrayLike, "*b t"]` as `float[*b, t]`; nothing for a scalar."""
    text = "" if annotation is None else ast.unparse(annotation)

    def short(match: re.Match) -> str:
        return f"{match[1].lower()}[{', '.join(match[2].split())}]" if match[2].strip() else match[1].lower()

    text = re.sub(r"(Float|Int|Bool)\[Array(?:Like)?, '([^']*)'\]", short, text)
    text = re.sub(r"dict\[str, float(\[[^]]*\])?\]", "{…}", text)
    text = re.sub(r"^tuple\[(.*)\]$", r"(\1)", text)
    return "" if text in ("Scalar", "Scalar | None") else text.replace("Scalar | ", "")


def signature(node: ast.FunctionDef, name: str) -> str:
    """The call with shapes and defaults, on one line if it fits."""

    def one(arg: ast.arg, default: ast.expr | None) -> str:
        kind = shape(arg.annotation)
        text = f"{arg.arg}: {kind}" if kind else arg.arg
        return (
            text
            if default is None
            else f"{text} = {ast.unparse(default)}"
            if kind
            else f"{text}={ast.unparse(default)}"
        )

    a = node.args
    first = [None] * (len(a.args) - len(a.defaults)) + list(a.defaults)
    parts = [one(arg, default) for arg, default in zip(a.args, first, strict=True)]
    if a.kwonlyargs:
        parts += ["*", *(one(arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True))]
    end = f") -> {shape(node.returns)}"
    line = f"{name}({', '.join(parts)}{end}"
    if len(line) <= 110:
        return line
    lines = [""]
    for part in parts:
        if len(lines[-1]) + len(part) > 104:
            lines.append("")
        lines[-1] += f"{part}, "
    body = "\n".join(f"    {line.rstrip()}" for line in lines)
    return f"{name}(\n{body}\n{end}"


def sentences(paragraph: str) -> list[str]:
    """A paragraph's sentences; an abbreviation ends none."""
    return re.split(r"(?<!\bal\.)(?<!\beq\.)(?<!\bDr\.)(?<=[.?])\s+", " ".join(paragraph.split()))


def cites(sentence: str) -> bool:
    """Whether it names a paper: a name and, after it, a year."""
    return re.search(r"[A-Z][\w’'-]+.*\b(1[89]|20)\d\d\b", sentence) is not None


def escaped(text: str) -> str:
    """Markdown that shows the text as it is, outside of backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts)


def described(doc: str) -> tuple[str, str]:
    """(what it is and its equation, its papers) of a docstring."""
    paragraphs = [p for p in re.split(r"\n\s*\n", doc) if not p.lstrip().startswith(">>>")]
    prose = [s for p in paragraphs if not p.startswith("    ") for s in sentences(p)]
    what = [escaped(" ".join(s for s in sentences(paragraphs[0]) if not cites(s) or s == prose[0]))]
    what += [f"```text\n{textwrap.dedent(p).rstrip()}\n```" for p in paragraphs[1:] if p.startswith("    ")]
    return "\n\n".join(what), escaped(" ".join(s for s in prose if cites(s) and s != prose[0]))


def takes(function: str, node: ast.FunctionDef) -> str:
    """What one number of each array stands for, and of the result."""
    readings = defaultdict(list)
    for arg in (*node.args.args, *node.args.kwonlyargs):
        if arg.annotation is not None and re.search(r"\b(Float|Int|Bool)\[", ast.unparse(arg.annotation)):
            reading = TAKES_HERE.get((function, arg.arg), TAKES[arg.arg])
            if reading is not None:
                readings[reading].append(f"`{arg.arg}`")
    of = "; ".join(f"{', '.join(names)} {reading}" for reading, names in readings.items())
    gives = GIVES.get(function) or GIVES[function.rsplit(".", 1)[0]]
    return f"- **Takes** {of}; **gives** {gives}" if of else f"- **Gives** {gives}"


def peer_name(peer: str, case: str) -> str:
    """What the peer calls what a case is of."""
    for pattern, name in PEER_NAMES[peer].items():
        if match := re.fullmatch(pattern, case):
            return match.expand(name)
    raise KeyError(f"PEER_NAMES has no name for {case} of {peer}")


def peers(function: str) -> str:
    """Each peer's names of a function, with the cases, and how it reads the paper otherwise; or the identity's test."""
    of_peer = defaultdict(lambda: defaultdict(list))
    for oracle in ORACLES:
        if oracle.function == function:
            name, package = PEERS[oracle.peer]
            version = numbers(oracle.peer)["versions"][package][:12]
            of_peer[f"{name} {version}"][peer_name(oracle.peer, oracle.case), oracle.reading].append(oracle.case)
    if not of_peer:
        return f"none; held by `{IDENTITIES[function]}`"
    lines = []
    for peer, named in of_peer.items():
        texts = []
        for (name, reading), cases in named.items():
            note = f", {escaped(reading)}" if reading else ""
            texts.append(f"{name} ({', '.join(cases)}{note})")
        lines.append(f"{peer} {', '.join(texts)}")
    return "; ".join(lines)


def entry(function: str, stages: list[str], configs: list[str]) -> str:
    """A function's part of the page."""
    module, name = home(function)
    node = code().defined[module][name]
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    what, papers = described(doc)
    if isinstance(node, ast.ClassDef):
        fields = [
            f"{n.target.id}={ast.unparse(n.value)}" for n in node.body if isinstance(n, ast.AnnAssign) and n.value
        ]
        update = signature(_update(node), "update").replace("(self, ", "(")
        call, how = f"{name}({', '.join(fields)}).{update}" if fields else f"{name}.init().{update}", ""
    else:
        call, how = signature(node, name), takes(function, node)
    lines = [f"- **Paper** {papers}"] if papers else []
    lines += [how] if how else []
    lines.append(f"- **Peers** {peers(function)}")
    if stages or configs:
        by = [f"stage{'s' * (len(stages) > 1)} {', '.join(stages)}"] if stages else []
        by += [f"config {', '.join(configs)}"] if configs else []
        lines.append(f"- **Used by** {'; '.join(by)}")
    return f"### `{name}`\n\n```python\n{call}\n```\n\n{what}\n\n" + "\n".join(lines) + "\n"


def _update(node: ast.ClassDef) -> ast.FunctionDef:
    return next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "update")


def page() -> str:
    """The whole page."""
    stages_of, named_in, configs_of = uses()
    functions = defaultdict(list)
    for function in public():
        functions[function.rsplit(".", 1)[0]].append(function)
    assert set(functions) == set(SECTIONS), set(functions) ^ set(SECTIONS)

    def place(function: str) -> tuple[str, int]:
        module, name = home(function)
        return module, code().defined[module][name].lineno

    contents, parts = [], []
    for section in SECTIONS:
        inside = sorted(functions[section], key=place)
        names = [f.rsplit(".", 1)[1] for f in inside]
        contents.append(
            f"- [{section}](#{section.replace('.', '')}): " + ", ".join(f"[`{n}`](#{n.lower()})" for n in names)
        )
        path = f"../rlhf_jax/{section.replace('.', '/')}.py"
        about = (ast.get_docstring(code().trees[f"rlhf_jax.{section}"]) or "").split("\n\n")
        parts.append(f"## {section}\n\n[{path[3:]}]({path}): {escaped(' '.join(' '.join(about).split()))}\n")
        parts += [entry(f, sorted(stages_of[home(f)]), sorted(named_in[home(f)])) for f in inside]
    table = ["| stage | configs |", "|---|---|"]
    table += [f"| {stage} | {', '.join(configs) or 'none'} |" for stage, configs in sorted(configs_of.items())]
    return "\n".join([HEAD, "\n".join(contents), "", "\n".join(table), "", "\n".join(parts)])


def main(arguments: list[str]) -> int:
    """Write the page, or say whether it is as it should be."""
    text = page()
    if arguments == ["--check"]:
        fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        if not fresh:
            print("docs/losses.md is stale: python docs/losses.py", file=sys.stderr)
        return int(not fresh)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
