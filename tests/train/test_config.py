"""Recipes: what they accept, and the one line that answers a mistake."""

import json
import shlex

import pytest
from pydantic import ValidationError

from model.config import ModelConfig, load_preset
from model.flops import flops_scaling
from parallel.layout import LayoutError, ParallelConfig
from train.config import Recipe, RecipeError, builtin_recipes, load_recipe, parse_recipe
from train.planning.advice import law_in_words
from train.planning.plan import Plan
from train.published import PUBLISHED
from train.scaling.law import load_law, save_law
from train.schedule import Schedule

# The tiny recipe is tuned now and then; the lines below quote these values.
FIXED = [
    "schedule={tokens: 2e6, lr: 3e-3, batch_tokens: 8192}",
    "data.sequence_length=256",
    "model.max_position_embeddings=512",
    "model.n_routed_experts=16",
]


def mistake_of(*overrides: str, recipe: str = "tiny") -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [*(FIXED if recipe == "tiny" else []), *overrides])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(tmp_path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


SHORTEST = """
model: {preset: tiny}
data: {train: stores/a, sequence_length: 8}
schedule: {tokens: 1e3, lr: 1e-3, batch_tokens: 16}
run: {dir: runs/a}
"""


def test_the_built_in_recipes_are_five_and_load():
    assert builtin_recipes() == ["small", "tiny", "v2-lite", "v3", "v3-long"]
    for name in builtin_recipes():
        recipe = load_recipe(name)
        Schedule(recipe.schedule, recipe.data.lengths).settings(0)


def test_the_v3_recipe_is_the_published_run():
    recipe = load_recipe("v3")
    published = PUBLISHED["deepseek-v3"]
    assert recipe.schedule.tokens == 14_800_000_000_000
    assert [list(stage) for stage in recipe.schedule.batch_tokens] == published["batch_tokens"]
    assert (recipe.schedule.lr, recipe.schedule.warmup_steps, recipe.schedule.shape) == (2.2e-4, 2000, "v3")
    assert (recipe.optimizer.betas, recipe.optimizer.weight_decay, recipe.optimizer.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert recipe.model_config_resolved().yarn is None  # pretraining at 4K uses plain RoPE


def test_the_v3_long_recipe_is_the_published_extension():
    recipe = load_recipe("v3-long")
    first, second = Schedule(recipe.schedule, recipe.data.lengths).spans
    assert (first.steps, first.sequence_length, first.sequences) == (1000, 32_768, 1920)
    assert (second.steps, second.sequence_length, second.sequences) == (1000, 131_072, 480)
    assert {
        Schedule(recipe.schedule, recipe.data.lengths).learning_rate(span.first_token) for span in (first, second)
    } == {7.3e-6}
    assert recipe.model_config_resolved().at_length(32_768).yarn.factor == 40


def test_the_v2_lite_recipe_has_the_papers_schedule_and_v3s_balancing():
    recipe = load_recipe("v2-lite")
    assert (recipe.schedule.tokens, recipe.schedule.lr) == (5_700_000_000_000, 4.2e-4)
    assert recipe.schedule.batch_tokens == 4608 * 4096
    assert recipe.schedule.milestones == ((0.8, 0.316), (0.9, 0.316 * 0.316))
    assert recipe.schedule.gamma[0] == (0, 0.001)
    assert recipe.model_config_resolved().yarn is None


def test_whole_numbers_may_be_written_in_any_yaml_form(tmp_path):
    path = written(tmp_path, SHORTEST)
    for text in ("10000000", "1e7", "10_000_000", "1.0e7", "1E+7"):
        tokens = load_recipe(path, [f"schedule.tokens={text}"]).schedule.tokens
        assert tokens == 10_000_000 and isinstance(tokens, int)


def test_what_a_recipe_leaves_out_has_its_default(tmp_path):
    recipe = load_recipe(
        written(tmp_path, SHORTEST + "evaluate:\n")
    )  # an empty section is null, and means the defaults
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.schedule.warmup_steps == 2000
    assert recipe.precision.compute is None
    assert recipe.data.train[0].weight == 1.0


def test_overrides_are_yaml_and_the_last_one_wins():
    recipe = load_recipe(
        "tiny",
        [
            "schedule.gamma=[[0, 0.001], [1e3, 0]]",
            "data.train=[stores/a, {path: stores/b, weight: 2, max_epochs: 4}]",
            "run.compile=false",
            "schedule.lr=1",
            "schedule.lr=2e-3",
            "checkpoint={every_minutes: 5}",
            "model.num_hidden_layers=2",
        ],
    )
    assert recipe.schedule.gamma == ((0, 0.001), (1_000, 0.0))
    assert [(source.path, source.weight, source.max_epochs) for source in recipe.data.train] == [
        ("stores/a", 1.0, None),
        ("stores/b", 2.0, 4.0),
    ]
    assert recipe.run.compile is False
    assert recipe.schedule.lr == 2e-3
    assert (recipe.checkpoint.every_minutes, recipe.checkpoint.every_steps) == (5.0, None)
    assert recipe.model_config_resolved().num_hidden_layers == 2


@pytest.mark.parametrize("name", ["tiny", "small", "v2-lite", "v3"])
def test_a_resolved_recipe_reads_back_equal(name, tmp_path):
    overrides = ["model.q_lora_rank=null", 'evaluate.sample_prompts=["1e7", "yes", "a: b\\n", "中"]']
    recipe = load_recipe(name, overrides)
    again = load_recipe(written(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert again.model_config_resolved().q_lora_rank is None


def test_a_resolved_recipe_says_everything():
    text = load_recipe("v3").to_yaml()
    assert "tokens: 14800000000000" in text
    assert "- [469000000000, 62914560]" in text  # the ramp is written out
    assert "lambda:" in text and "lambda_" not in text
    assert "eps: 1e-08" in text


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError):
        load_recipe("tiny").schedule.lr = 1.0


def test_a_model_may_come_from_a_config_json(tmp_path):
    config = load_preset("tiny")
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = load_recipe("tiny", ["model.preset=null", f"model.config={tmp_path}/config.json", "model.hidden_size=1e2"])
    assert recipe.model_config_resolved() == ModelConfig.from_hf(config).override({"hidden_size": 100})


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("schedule.lrate=3", "schedule.lrate = 3: unknown key; did you mean schedule.lr?"),
        ("lr=3", "lr = 3: unknown key; did you mean schedule.lr?"),
        ("seed=3", "seed = 3: unknown key; did you mean data.seed or run.seed?"),
        ("model.hiden_size=1", "model.hiden_size = 1: unknown key; did you mean model.hidden_size?"),
        (
            "data.train=[{path: a, wight: 2}]",
            "data.train.0.wight = 2: unknown key; did you mean data.train.0.weight?",
        ),
        ("schedule.zzz=1", "schedule.zzz = 1: unknown key; the keys of schedule are preset, tokens, lr, batch_tokens"),
        (
            "schedule.tokens=1.5",
            "schedule.tokens = 1.5: must be a whole number, at least 1; write it like 100, 1_000 or 1e7",
        ),
        ("schedule.tokens=true", "schedule.tokens = true: must be a whole number"),
        ("schedule.tokens='1e7'", "schedule.tokens = '1e7': must be a whole number"),
        ("schedule.tokens=.nan", "schedule.tokens = NaN: must be a whole number"),
        ("schedule.lr=-1", "schedule.lr = -1: must be a number more than 0; write it like 0.1 or 4e-4"),
        ("optimizer.eps=.inf", "optimizer.eps = Infinity: must be a finite number more than 0; write it like"),
        (
            "schedule.shape=wds",
            "schedule.shape = 'wds': must be 'v3', 'multistep', 'cosine' or 'wsd'; did you mean wsd?",
        ),
        ("schedule.gamma=[[5, 1]]", "schedule.gamma = [[5, 1]]: must start at 0 tokens, with growing token counts;"),
        ("schedule.gamma=[1, 2]", "schedule.gamma = [1, 2]: must be a number or a list of [tokens, value];"),
        (
            "schedule.gamma=[[0, 1], [1e9, 0]]",
            "schedule.gamma = [[0, 1.0], [1000000000, 0.0]]: changes at 1,000,000,000 tokens, and the run ends at",
        ),
        ("schedule.milestones=[[0.5, 1]]", "schedule.milestones = [[0.5, 1.0]]: belong to shape multistep, not to v3;"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1 = 1: must be a number at least 0 and less than 1;"),
        ("logging.tensorboard=yes", "logging.tensorboard = 'yes': must be true or false; write one of them"),
        ("run.compile=1", "run.compile = 1: must be auto, true, false or graphs;"),
        ("run.device=gpu", "run.device = 'gpu': must be 'auto', 'cpu' or 'cuda'; did you mean cpu?"),
        ("run.dir=", "run.dir = null: must be text;"),
        ("schedule=5", "schedule = 5: must be a map of keys;"),
        ("data.train=[]", "data.train = []: must be a token store or a list of {path, weight, max_epochs};"),
        ("model.preset=huge", "model.preset: 'huge' is not a preset; choose one of"),
        ("model.n_group=3", "model.n_group: 3 does not divide n_routed_experts = 16; choose a divisor"),
        ("model.config=a.json", "model = "),
        ("foo", "override 'foo': must be section.key=value; write for example schedule.lr=4e-4"),
        ("schedule.lr.x=4", "schedule.lr.x = 4: schedule.lr is 0.003 and has no keys; give the whole schedule.lr=…"),
        ("schedule.gamma=[[0", "schedule.gamma = '[[0': is not YAML ("),
    ],
)
def test_a_mistake_is_one_line_with_field_value_rule_and_fix(override, line):
    assert mistake_of(override).startswith(line)


def test_a_sequence_longer_than_the_models_context_is_refused():
    assert mistake_of("data.sequence_length=1024") == (
        "data.sequence_length = 1024: is more than model.max_position_embeddings = 512; "
        "lower it or write model.max_position_embeddings=1024"
    )


def test_a_stage_beyond_the_context_says_how_to_extend_it():
    """What it says to write works."""
    longer = "data.stages=[{from_tokens: 100, sequence_length: 2048}]"
    line = mistake_of(longer)
    assert line.startswith("data.stages.0.sequence_length = 2048: is more than model.max_position_embeddings = 512; ")
    fix = line.partition("write ")[2].replace(", and to extend the context there by YaRN", "")
    changes = shlex.split(fix)
    assert [change.partition("=")[0] for change in changes] == ["model.max_position_embeddings", "model.rope_scaling"]
    config = load_recipe("tiny", [*FIXED, longer, *changes]).model_config_resolved()
    assert config.at_length(512).yarn is None
    assert (config.at_length(2048).yarn.factor, config.at_length(2048).max_position_embeddings) == (4, 2048)


def test_a_sequence_longer_than_yarn_reaches_is_refused():
    scaling = "model.rope_scaling={type: yarn, factor: 4, original_max_position_embeddings: 128}"
    load_recipe("tiny", [*FIXED, scaling, "data.sequence_length=512"])
    assert mistake_of(scaling, "model.max_position_embeddings=1024", "data.sequence_length=1024") == (
        "data.sequence_length = 1024: is more than model.rope_scaling.factor · original_max_position_embeddings = 4 · 128, as far "
        "as YaRN reaches; lower it or write a factor of 8"
    )


def test_stages_inherit_what_they_leave_out():
    longer = "{from_tokens: 100, sequence_length: 512, micro_batch: 2}"
    other = "{from_tokens: 200, train: [a, b], packing: best_fit}"
    recipe = load_recipe("tiny", [*FIXED, f"data.stages=[{longer}, {other}]"])
    first, second, third = recipe.data.consumption()
    assert (first.sequence_length, second.sequence_length, third.sequence_length) == (256, 512, 512)
    assert first.train == second.train and [source.path for source in third.train] == ["a", "b"]
    assert [recipe.micro_batch(tokens) for tokens in (0, 99, 100, 250)] == [recipe.parallel.micro_batch] * 2 + [2, 2]
    assert (second.packing, third.packing) == ("concat", "best_fit")
    assert recipe.data.lengths == ((0, 256), (100, 512), (200, 512))
    assert parse_recipe(recipe.model_dump(by_alias=True)) == recipe


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        (
            "sequence_length: 1024",
            "data.stages.0.sequence_length = 1024: is more than model.max_position_embeddings = 512; ",
        ),
        (
            "sequence_length: 384",
            "schedule.batch_tokens = 8192: 8,192 is not a multiple of data.stages.0.sequence_length = 384;",
        ),
        (
            "packing: concat}, {from_tokens: 90, micro_batch: 1",
            "data.stages = [100, 90]: must have growing from_tokens; sort them",
        ),
        (
            "train: null",
            'data.stages.0 = {"from_tokens": 100, "train": null}: changes nothing; it may give train, sequence_length,',
        ),
        ("packin: concat", "data.stages.0.packin = 'concat': unknown key; did you mean data.stages.0.packing?"),
        (
            "train: [{path: a, wight: 2}]",
            "data.stages.0.train.0.wight = 2: unknown key; did you mean data.stages.0.train.0.weight",
        ),
        ("train: []", "data.stages.0.train = []: must be a token store or a list of {path, weight, max_epochs}; "),
        (
            "packing: best_fit}, {from_tokens: 1e9, micro_batch: 1",
            "data.stages.1.from_tokens = 1000000000: begins at 1,000,000,000",
        ),
    ],
)
def test_a_stage_that_cannot_be_is_a_mistake(stages, line):
    assert mistake_of(f"data.stages=[{{from_tokens: 100, {stages}}}]").startswith(line)


@pytest.mark.parametrize("batch", ["10000", "[[0, 8192], [1e6, 10000]]"])
def test_a_batch_that_is_not_whole_sequences_is_refused(batch):
    # 10,000 / 256 = 39.06, and 39 · 256 = 9,984
    line = mistake_of(f"schedule.batch_tokens={batch}")
    assert line.startswith("schedule.batch_tokens = ")
    assert line.endswith("10,000 is not a multiple of data.sequence_length = 256; write for example 9984")


STEP_LAW = ["schedule.law=step-law", "schedule.lr=auto", "schedule.batch_tokens=auto"]


def test_auto_is_the_laws_answer_for_the_models_n_and_the_runs_tokens():
    # N = 119,047,520 without embedding and head, all experts counted; D = 3e9:
    #   1.79 · N^-0.713 · D^0.307 = 2.537e-3
    #   0.58 · D^0.571 = 149,577 tokens = 73.04 sequences; of 64 and 96 the next in ratio is 64
    schedule = load_recipe("small", [*STEP_LAW, "schedule.tokens=3e9"]).schedule
    assert (schedule.lr, schedule.batch_tokens, schedule.law) == (0.002537, 64 * 2048, "step-law")


def test_auto_of_a_law_in_compute_counts_every_stage_at_its_own_context():
    stages = "data.stages=[{from_tokens: 1e6, sequence_length: 512}]"
    recipe = load_recipe("tiny", [*FIXED, "schedule.lr=auto", "schedule.law=deepseek-llm", stages])
    config = recipe.model_config_resolved()
    flops = 1e6 * (flops_scaling(config, 256) + flops_scaling(config, 512))  # D = 2e6
    assert recipe.schedule.lr == pytest.approx(0.3118 * flops**-0.125, rel=1e-3)


def test_an_automatic_batch_is_whole_sequences_of_every_stage_and_of_the_multiple():
    wanted = ["schedule.batch_tokens=auto", "schedule.law=deepseek-llm", "schedule.tokens=1e8"]
    stages = "data.stages=[{from_tokens: 1e6, sequence_length: 512}]"
    assert load_recipe("tiny", [*FIXED, *wanted, stages]).schedule.batch_tokens % 512 == 0
    # M = 1.46e7: C = 1.46e15, 0.292 · C^0.3271 = 26,665 tokens = 104.2 sequences = 20.8 fives; of 16 and 24 the next is 24
    assert load_recipe("tiny", [*FIXED, *wanted, "schedule.batch_multiple=5"]).schedule.batch_tokens == 24 * 5 * 256


def test_what_a_law_decided_is_written_as_numbers_and_reads_back_equal(tmp_path):
    asked = ["schedule.lr=auto", "schedule.batch_tokens=ramp", "schedule.law=deepseek-llm", "schedule.tokens=1e8"]
    recipe = load_recipe("tiny", asked)
    assert recipe.schedule.lr_batch_exponent == 0.5 and len(recipe.schedule.batch_tokens) == 5
    text = recipe.to_yaml()
    assert "law: deepseek-llm" in text and "auto" not in text.partition("schedule:")[2].partition("run:")[0]
    assert load_recipe(written(tmp_path, text)) == recipe


def test_numbers_from_a_law_stay_when_the_law_is_gone(tmp_path):
    law = tmp_path / "law.json"
    save_law(load_law("ling-moe"), law)
    recipe = load_recipe("tiny", ["schedule.lr=auto", f"schedule.law={law}"])
    law.unlink()
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe
    assert law_in_words(recipe) == [f"law {law}: is not here; the recipe keeps the numbers that were taken from it"]


@pytest.mark.parametrize(
    ("changes", "start", "end"),
    [
        (["lr=auto", "law=steplaw"], "schedule.law = 'steplaw': must be a file or one of chinchilla, ", "; did you mean step-law?"),
        (["lr=auto", "law=chinchilla"], "schedule.law = 'chinchilla': has no lr, only loss; use another law", ""),
        (["batch_tokens=ramp", "law=chinchilla"], "schedule.law = 'chinchilla': has no batch_tokens, only loss;", ""),
        (["lr=automatic"], "schedule.lr = 'automatic': must be a number more than 0, or auto; write it like 4e-4", ""),
        (["batch_tokens=grow"], "schedule.batch_tokens = 'grow': must be a number, auto, ramp or a list of", ""),
        (["lr=auto", "tokens=many"], "schedule.tokens = 'many': must be a whole number, at least 1; write it like 100", ""),
        (["batch_tokens=auto", "batch_multiple=0"], "schedule.batch_multiple = 0: must be a whole number, at least 1;", ""),
    ],
)  # fmt: skip
def test_what_a_law_cannot_decide_is_one_line(changes, start, end):
    line = mistake_of(*(f"schedule.{change}" for change in changes))
    assert line.startswith(start) and line.endswith(end)


def test_a_mistake_in_the_model_or_the_data_is_told_before_what_a_law_would_need_of_them():
    auto = ("schedule.lr=auto", "schedule.batch_tokens=auto")
    assert mistake_of(*auto, "model.hidden_size=0").startswith("model.hidden_size: 0 is too small")
    assert mistake_of(*auto, "data.sequence_length=0").startswith("data.sequence_length = 0: must be a whole number")


def test_the_law_is_told_beside_what_the_recipe_has_and_warned_of_when_it_is_far():
    far = law_in_words(load_recipe("tiny", [*FIXED, "schedule.lr=auto"]))
    assert far[0].startswith("law step-law, for N = 4.") and "D = 2e+06" in far[0]
    assert far[1].startswith("  decades outside of what it was measured on: N 1.7, D 3.3")
    assert far[2].endswith("; the recipe has 0.002665") and far[3].endswith("; the recipe has 8,192 tokens")
    assert far[4].startswith("warning: law step-law is far outside") and "D by 3.3 decades" in far[4]
    near = law_in_words(load_recipe("small", [*STEP_LAW, "schedule.tokens=1e10"]))
    assert len(near) == 4 and "D 0.0" in near[1]  # part of a decade of N below what was measured is no reason
    assert law_in_words(load_recipe("tiny")) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        # the law of N = 119,047,520 and D = 1e10: 0.58 · D^0.571 = 297,460 tokens and 1.79 · N^-0.713 · D^0.307 = 3.67e-3
        (["schedule.batch_tokens=131072"], "its learning rate belongs to a batch of 297,460 tokens, the recipe has 131,072;"),
        (["schedule.batch_tokens=262144"], None),
        (["schedule.lr=1e-3"], "its batch belongs to a learning rate of 0.00367, the recipe has 0.001;"),
        (["schedule.lr=3e-3"], None),
        (["schedule.lr=1e-3", "schedule.batch_tokens=131072"], None),
    ],
)  # fmt: skip
def test_half_a_laws_answer_beside_a_number_that_is_far_from_its_other_half_is_warned_of(changes, line):
    said = law_in_words(load_recipe("small", [*STEP_LAW, "schedule.tokens=1e10", *changes]))[4:]
    assert [text.partition("warning: law step-law: ")[2][: len(line or "")] for text in said] == [line] * (
        line is not None
    )


def test_what_a_law_gave_is_written_until_another_number_is_given(tmp_path):
    path = written(tmp_path, load_recipe("tiny", [*STEP_LAW, "schedule.tokens=1e8"]).to_yaml())
    whole, taken = load_recipe(path).schedule, load_law("step-law").hash
    assert whole.from_law.numbers == {"lr": whole.lr, "batch_tokens": whole.batch_tokens}
    assert whole.from_law.hash == taken
    assert set(load_recipe(path, ["schedule.lr=1e-3"]).schedule.from_law.numbers) == {"batch_tokens"}
    assert set(load_recipe(path, ["schedule.tokens=2e8", "schedule.lr=auto"]).schedule.from_law.numbers) == {
        "lr",
        "batch_tokens",
    }
    assert load_recipe(path, ["schedule.lr=1e-3", "schedule.batch_tokens=4096"]).schedule.from_law is None
    assert load_recipe("tiny", ["schedule.law=step-law"]).schedule.from_law is None


def test_a_law_that_has_changed_since_is_told(tmp_path):
    law = tmp_path / "law.json"
    save_law(load_law("ling-moe"), law)
    recipe = load_recipe("tiny", ["schedule.lr=auto", f"schedule.law={law}"])
    save_law(load_law("step-law"), law)
    assert "  it has changed since the recipe's lr were taken from it" in law_in_words(recipe)


def test_the_parallel_section_becomes_a_layout_on_a_number_of_processes():
    changes = ["parallel={engine: fsdp, replicate: 2, expert: 4, micro_batch: 2, offload: all, recompute: full}"]
    layout = load_recipe("tiny", [*FIXED, *changes]).layout(16)
    assert layout.config == ParallelConfig("fsdp", 2, 4, micro_batch=2, offload="all", recompute="full")
    assert (layout.shard, layout.expert_shard) == (8, 2)
    with pytest.raises(LayoutError, match=r"^parallel.expert = 4: does not divide the 2 processes of each of 2 copies"):
        load_recipe("tiny", [*FIXED, *changes]).layout(4)


def test_fp8_and_its_dispatch_are_part_of_the_layout():
    changes = ["parallel={engine: fsdp, expert: 2}", "precision={fp8: true, fp8_dispatch: true}"]
    config = load_recipe("tiny", [*FIXED, *changes]).layout(2).config
    assert config == ParallelConfig("fsdp", expert=2, fp8=True, fp8_dispatch=True)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            ["precision={fp8: true, compute: fp16}"],
            "precision.compute = 'fp16': does not go with precision.fp8: its scales have the range of fp32, and between two "
            "products fp16 would overflow; write precision.compute=bf16 (or fp32), or precision.fp8=false",
        ),
        (
            ["precision.fp8=true", "run.compile=true"],
            "run.compile = true: does not go with precision.fp8, whose functions have kernels of their own, which torch.compile "
            "cannot fuse; write run.compile=false, or precision.fp8=false",
        ),
        (
            ["precision.fp8=true", "precision.fp8_dispatch=true"],
            "precision.fp8_dispatch = true: is for experts that compute in FP8 on several processes; here precision.fp8 is true "
            "and parallel.expert 1; write precision.fp8=true and a parallel.expert above 1, or precision.fp8_dispatch=false",
        ),
    ],
    ids=["fp16", "compile", "dispatch"],
)
def test_what_does_not_go_with_fp8_is_refused(changes, line):
    with pytest.raises(RecipeError) as refused:
        load_recipe("tiny", [*FIXED, *changes])
    assert str(refused.value) == line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["parallel.recompute=selective"], "write parallel.recompute=none"),
        (["run.device=cuda"], "write parallel.recompute=none"),  # whose default is selective
        (["parallel.engine=zero1"], "write parallel.engine=ddp or fsdp"),
        (["parallel={engine: fsdp, expert: 2}"], "write parallel.expert=1"),
        (["parallel.engine=fsdp", "run.compile=graphs"], "write parallel.engine=ddp, or run.compile=false"),
        (["parallel.pipeline=2"], "write parallel.pipeline=1"),
        (["parallel.context=2"], "write parallel.context=1"),
    ],
)
def test_what_does_not_go_with_compiled_blocks_is_refused(changes, says):
    with pytest.raises(RecipeError, match=r"run\.compile = ") as refused:
        load_recipe("tiny", [*FIXED, "run.device=cpu", "run.compile=true", *changes])
    assert says in str(refused.value)
    load_recipe("tiny", [*FIXED, "run.device=cpu", "run.compile=true", "parallel.engine=fsdp"])


def test_the_plan_knows_what_fp8_keeps():
    def plan(precision: str, recompute: str) -> dict:
        parallel = f"parallel={{engine: fsdp, expert: 2, recompute: {recompute}}}"
        recipe = load_recipe("v3", [parallel, "run.device=cpu", f"precision={precision}"])
        return Plan.of(recipe, Schedule(recipe.schedule, recipe.data.lengths), 1024).numbers()

    plain, fp8 = plan("{}", "none"), plan("{fp8: true}", "none")
    changed = {name for name in plain if plain[name] != fp8[name]}
    assert changed == {"bytes_of_activations", "peak_bytes_per_rank"}
    assert fp8["bytes_of_activations"] < plain["bytes_of_activations"]
    fp8, dispatch = plan("{fp8: true}", "selective"), plan("{fp8: true, fp8_dispatch: true}", "selective")
    # rows that arrived in 7,168 + 56 bytes in place of 4 · 7,168: 8 to each of 4,096 tokens in 59 layers
    assert fp8["bytes_of_activations"] - dispatch["bytes_of_activations"] == 59 * 4096 * 8 * (4 * 7168 - 7224)


def test_a_ds_config_is_a_map_or_a_file_and_the_recipe_keeps_what_it_says(tmp_path):
    content = {"zero_optimization": {"reduce_bucket_size": 1e6, "overlap_comm": False}, "steps_per_print": 10}
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(content))
    read = load_recipe("tiny", ["parallel.engine=zero2", f"parallel.deepspeed={file}"])
    given = load_recipe("tiny", ["parallel.engine=zero2", f"parallel.deepspeed={json.dumps(content)}"])
    file.unlink()
    assert read == given == load_recipe(written(tmp_path, read.to_yaml()))
    assert read.layout(2).config.deepspeed == content
    assert load_recipe("tiny", ["parallel.deepspeed=null"]).layout(2).config.deepspeed == {}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is not a JSON file (Expecting property name"),
        ('{"a": 1, "a": 2}', "is not a JSON file (it has the key a twice)"),
        ("[1, 2]", "must be a map, or the path of a JSON file that has one; write null to leave it out"),
    ],
)
def test_a_ds_config_that_cannot_be_used_is_a_mistake(text, rule, tmp_path):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    line = mistake_of(f"parallel.deepspeed={path}")
    assert line.startswith("parallel.deepspeed = '") and f"': {rule}" in line


def test_of_several_mistakes_the_first_is_explained_and_the_others_are_counted():
    assert mistake_of("schedule.lr=-1", "run.dir=5", "run.seed=-1").endswith("write it like 0.1 or 4e-4 (and 2 more)")


def test_a_missing_key_says_where_it_goes(tmp_path):
    path = written(tmp_path, SHORTEST.replace("tokens: 1e3, ", ""))
    assert mistake_of(recipe=path) == (
        "schedule.tokens: missing; it has no default; give it in the recipe or as schedule.tokens=…"
    )
    assert mistake_of(recipe=written(tmp_path, "")).endswith("(and 3 more)")


def test_a_duplicate_key_is_a_mistake_with_its_line(tmp_path):
    line = mistake_of(recipe=written(tmp_path, SHORTEST + "run: {dir: runs/b}\n"))
    assert "run" in line and "line 6" in line


def test_a_recipe_that_is_not_there_names_the_built_in_ones():
    assert mistake_of(recipe="tinny") == (
        "recipe 'tinny': must be a file or one of small, tiny, v2-lite, v3, v3-long; did you mean tiny?"
    )


@pytest.mark.parametrize("text", [None, "{", "[1, 2]"])
def test_a_model_config_that_cannot_be_read_is_a_mistake(text, tmp_path):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    line = mistake_of("model.preset=null", f"model.config={path}")
    assert line.startswith("model.config = ") and line.endswith("give the path of a config.json")


def test_a_recipe_may_be_validated_from_values():
    recipe = load_recipe("small")
    assert parse_recipe(recipe.model_dump(by_alias=True)) == recipe
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize(
    ("given", "device", "mode"),
    [(None, "cuda", "selective"), (None, "cpu", "none"), ("none", "cuda", "none"), ("full", "cpu", "full")],
)
def test_recomputation_is_deepseeks_on_a_gpu_and_off_on_a_cpu_unless_it_is_given(given, device, mode):
    recompute = [f"parallel.recompute={given}"] if given else []
    recipe = load_recipe("tiny", [*FIXED, f"run.device={device}", *recompute])
    assert recipe.recompute == recipe.layout(1).config.recompute == mode
    assert recipe.parallel.recompute == given  # which a run that moves to another device decides again


def test_the_plan_counts_what_the_device_keeps():
    def activations(*changes: str) -> int:
        recipe = load_recipe(
            "small", ["schedule.law=null", "schedule.lr=1e-3", "schedule.batch_tokens=32768", *changes]
        )
        return Plan.of(recipe, Schedule(recipe.schedule, recipe.data.lengths), 1).numbers()["bytes_of_activations"]

    on_gpu = "run.device=cuda"
    assert activations(on_gpu) == activations(on_gpu, "parallel.recompute=selective")
    assert activations(on_gpu) < activations(on_gpu, "parallel.recompute=none")
