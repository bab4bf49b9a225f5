"""A run's export is a Hugging Face folder: transformers loads it, computes the same, and it comes back bit for bit."""

import json
import shutil
import weakref

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_layers import MtpModel

from data.tokenizer import fingerprint
from model.config import FP8_STORAGE, ConfigError, ModelConfig, YarnScaling, load_preset
from model.hf import IN_FP8, quantized, to_hf
from tests.small_model import small_model
from train import checkpoint
from train.checkpoint import CheckpointError, Checkpoints
from train.cli import main
from train.export import _write_shards, export, import_folder, off_tiles
from train.generate import _Speculation, continue_text, continue_texts, generate, load_model
from train.weights import is_buffer, open_weights

VOCABULARY = 320
SHARD = 150_000  # bytes; the model has about 850,000


@pytest.fixture(scope="module", autouse=True)
def _group():
    """A checkpoint is saved by the ranks of a group, here a group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE, saved by transformers 5."""
    bpe = ByteLevelBPETokenizer()
    text = "It is a way I have of driving off the spleen, and regulating the circulation. Call me Ishmael. " * 3
    bpe.train_from_iterator([text], vocab_size=VOCABULARY - 10, special_tokens=["<s>", "</s>"], show_progress=False)
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, tokenizer_folder):
    """make_run(**changes) → (model, run folder with a checkpoint of it)."""

    def make(**changes):
        model = small_model(vocab_size=VOCABULARY, **changes)
        folder = tmp_path_factory.mktemp("run")
        state = {"parameters": dict(model.named_parameters()), "buffers": dict(model.named_buffers())}
        state["exp_avg"] = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
        state["ema"] = {name: tensor / 2 for name, tensor in model.named_parameters()}
        shutil.copytree(tokenizer_folder, folder / "tokenizer")
        run = {"model": model.config.to_hf(), "recipe": {"optimizer": {"ema": 0.5}}}
        run["tokenizer_fingerprint"] = fingerprint(tokenizer_folder)
        Checkpoints(folder / "checkpoints", asynchronous=False).save(20, state, run)
        return model, folder

    return make


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


@pytest.fixture
def mtp_layers(monkeypatch):
    """mtp_layers(first, depths): tell transformers' loader where the MTP layers are; its own pattern is for layer 61."""

    def tell(first, depths):
        patterns = [rf"model\.layers\.{first + depth}\..*" for depth in range(depths)]
        monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", patterns)

    return tell


@torch.no_grad()
def assert_same_model(hf, model):
    """Logits within 1e-5 and the same greedy text."""
    tokens = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    ours = model.lm_head(model.decode(tokens, model.new_caches(2, 24)[:3]))
    assert ours.std() > 0.3
    assert (hf(tokens).logits - ours).abs().max() <= 1e-5
    expected = generate(model, tokens[:1], 24).tokens
    assert torch.equal(hf.generate(tokens[:1], max_new_tokens=24, do_sample=False, eos_token_id=None), expected)


def tensors_of(folder):
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


YARN = YarnScaling(factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "rope_scaling": YARN}, {"num_nextn_predict_layers": 0}])
def test_transformers_computes_the_same_from_an_export(make_run, tmp_path, changes):
    model, folder = make_run(**changes)
    export(folder, tmp_path / "out", max_shard_bytes=SHARD)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


@pytest.mark.parametrize("cpu_bytes", [10_000_000, 600_000])
def test_accelerate_places_an_export_and_offloads_it_to_disk(run, tmp_path, cpu_bytes):
    export(run[1], tmp_path / "out", max_shard_bytes=SHARD)
    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map="auto", max_memory={"cpu": cpu_bytes}, offload_folder=tmp_path / "offload"
    )
    offloaded = set(getattr(hf, "hf_device_map", {}).values())
    assert offloaded == {"cpu", "disk"} if cpu_bytes == 600_000 else "disk" not in offloaded
    assert_same_model(hf, run[0])


@pytest.mark.parametrize("depths", [1, 2])
def test_transformers_speculates_with_the_mtp_layers_of_an_export(make_run, tmp_path, mtp_layers, monkeypatch, depths):
    model, folder = make_run(num_nextn_predict_layers=depths)
    export(folder, tmp_path / "out", mtp=True, max_shard_bytes=SHARD)
    mtp_layers(3, depths)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(0, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(4))

    drafts = {"theirs": [], "ours": []}

    def record(owner, function, to_drafts, side):
        def recorded(*args, **kwargs):
            result = function(*args, **kwargs)
            drafts[side].append(to_drafts(result)[0].tolist())
            return result

        monkeypatch.setattr(owner, function.__name__, recorded)

    record(MtpModel, MtpModel.forward, lambda result: result[0], "theirs")
    record(_Speculation, _Speculation._draft, lambda result: result, "ours")
    expected = generate(model, tokens, 20).tokens
    assert torch.equal(generate(model, tokens, 20, mtp=True).tokens, expected)
    theirs = hf.generate(tokens, max_new_tokens=20, do_sample=False, use_mtp=True, eos_token_id=None)
    assert torch.equal(theirs, expected)
    assert len(drafts["theirs"]) > 10
    # Rounds that end with the text: we draft no further than it goes.
    assert drafts["theirs"][: len(drafts["ours"]) - 2] == drafts["ours"][:-2]


def test_bf16_rounds_all_but_the_expert_bias(run, tmp_path):
    export(run[1], tmp_path / "out", dtype="bf16", mtp=True)
    for key, tensor in tensors_of(tmp_path / "out").items():
        assert tensor.dtype == (torch.float32 if is_buffer(key) else torch.bfloat16)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = run[0].state_dict()
    assert hf.dtype == torch.bfloat16
    for name, tensor in hf.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
        assert is_buffer(name) == (tensor.dtype == torch.float32), name


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_an_import_is_a_checkpoint_with_the_same_bits(make_run, tmp_path, depths):
    model, folder = make_run(num_nextn_predict_layers=depths)
    export(folder, tmp_path / "hf", mtp=depths > 0, max_shard_bytes=SHARD)
    import_folder(tmp_path / "hf", tmp_path / "imported")

    fresh = small_model(seed=9, vocab_size=VOCABULARY, num_nextn_predict_layers=depths)
    state = {"parameters": dict(fresh.named_parameters()), "buffers": dict(fresh.named_buffers())}
    run_json = checkpoint.load(tmp_path / "imported", state)
    assert run_json["imported_from"] == "hf"
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in fresh.state_dict().items())

    assert open_weights(tmp_path / "imported").config == model.config
    export(tmp_path / "imported", tmp_path / "again", mtp=depths > 0)
    first, again = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "again")) == len(AutoTokenizer.from_pretrained(tmp_path / "hf"))


def test_weights_that_transformers_saved_are_imported(run, tmp_path):
    export(run[1], tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    import_folder(tmp_path / "saved", tmp_path / "imported")
    state = run[0].state_dict()
    for name, tensor in open_weights(tmp_path / "imported").tensors():
        assert torch.equal(tensor, state[name])


def test_bf16_weights_become_fp32_parameters(run, tmp_path):
    export(run[1], tmp_path / "out", dtype="bf16")
    import_folder(tmp_path / "out", tmp_path / "imported")
    state = run[0].state_dict()
    for name, tensor in open_weights(tmp_path / "imported").tensors():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name] if is_buffer(name) else state[name].bfloat16().float())


def test_shards_keep_to_their_size_and_the_index_names_them(run, tmp_path):
    export(run[1], tmp_path / "out", mtp=True, max_shard_bytes=SHARD)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 4
    total = 0
    for path in files:
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= SHARD
        assert {index["weight_map"].pop(key) for key in tensors} == {path.name}
        total += sum(tensor.nbytes for tensor in tensors.values())
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == total


def test_what_fits_into_one_shard_is_one_file_without_an_index(run, tmp_path):
    export(run[1], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_no_more_than_one_shard_is_in_memory(tmp_path):
    alive = weakref.WeakSet()
    most = 0

    def tensors():
        nonlocal most
        for i in range(40):
            tensor = torch.full((1000,), float(i))
            alive.add(tensor.untyped_storage())
            most = max(most, sum(storage.nbytes() for storage in alive))
            yield f"t{i}", tensor
            del tensor

    _write_shards(tensors(), tmp_path, 5 * 4000)
    assert len(list(tmp_path.glob("model-*"))) == 8
    assert most <= 6 * 4000  # a shard of five, and the tensor that did not fit into it


def test_the_configuration_says_what_is_in_the_folder(make_run, tmp_path):
    _, folder = make_run(num_nextn_predict_layers=2, rope_scaling=YARN)
    export(folder, tmp_path / "plain", dtype="bf16")
    export(folder, tmp_path / "mtp", mtp=True)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert (config["topk_method"], config["scoring_func"], config["moe_layer_freq"]) == ("noaux_tc", "sigmoid", 1)
    assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "yarn"
    assert json.loads((tmp_path / "mtp" / "config.json").read_text())["num_nextn_predict_layers"] == 2
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "mtp")
    assert loaded.num_mtp_layers == 2
    assert loaded.rope_parameters["factor"] == 4.0


def test_the_tokenizer_travels_with_the_weights(run, tmp_path, tokenizer_folder):
    export(run[1], tmp_path / "out")
    original = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    text = "Call me Ishmael — quick brown föx 123"
    for loader in (AutoTokenizer, PreTrainedTokenizerFast):
        loaded = loader.from_pretrained(tmp_path / "out")
        assert loaded(text).input_ids == original(text).input_ids
        assert loaded.decode(loaded(text).input_ids) == text
    # What transformers 4 reads: it knows no TokenizersBackend.
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (original.bos_token_id, original.eos_token_id)


def test_run_checkpoint_import_and_folder_give_one_model_and_one_text(run, tmp_path):
    model, folder = run
    export(folder, tmp_path / "hf", mtp=True)
    import_folder(tmp_path / "hf", tmp_path / "imported")
    texts = set()
    for source in (folder, folder / "checkpoints" / "step-00000020", tmp_path / "hf", tmp_path / "imported"):
        loaded, tokenizer = load_model(source)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        texts |= set(continue_texts(loaded, tokenizer, ["Call me Ishmael", ""], max_new_tokens=10))
        assert continue_text(loaded, tokenizer, "Call me Ishmael", 10, mtp=True)[0] in texts
    assert len(texts) == 2


def test_weights_without_a_tokenizer_are_loaded_but_write_no_text(run, tmp_path):
    export(run[1], tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    import_folder(tmp_path / "hf", tmp_path / "imported")
    loaded, tokenizer = load_model(tmp_path / "imported")
    assert tokenizer is None
    assert generate(loaded, torch.tensor([[1]]), 2).tokens.shape == (1, 3)
    with pytest.raises(ConfigError, match="tokenizer"):
        continue_text(loaded, tokenizer, "Call me", 2)


def test_a_model_loaded_in_bf16_keeps_norms_and_gates_in_fp32(run):
    loaded, _ = load_model(run[1], torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    fp32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert fp32 == {name for name in dtypes if "norm" in name or ".mlp.gate." in name}
    expected = run[0].model.layers[1].mlp.gate.weight
    assert torch.equal(loaded.model.layers[1].mlp.gate.weight, expected)
    assert generate(loaded, torch.tensor([[5, 6, 7]]), 5).tokens.shape == (1, 8)


def test_a_folder_that_is_not_empty_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        export(run[1], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    (tmp_path / "out" / "notes.txt").unlink()
    export(run[1], tmp_path / "out")


def test_a_half_written_export_is_never_seen(run, tmp_path):
    export(run[1], tmp_path / "hf", max_shard_bytes=SHARD)
    last = sorted((tmp_path / "hf").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    for write in (export, import_folder):
        with pytest.raises(CheckpointError, match=last.name):
            write(tmp_path / "hf", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_file_that_the_index_names_and_that_is_missing_is_the_weights_fault(in_fp8, tmp_path):
    folder = shutil.copytree(in_fp8[2], tmp_path / "hf")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    for write in (export, import_folder):
        with pytest.raises(CheckpointError, match=rf"^weights {folder}: {lost.name} is missing; .*fetch them again$"):
            write(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_index_that_points_to_the_wrong_file_is_named(run, tmp_path):
    export(run[1], tmp_path / "hf", max_shard_bytes=SHARD)
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"places lm_head\.weight in model-00001"):
        import_folder(tmp_path / "hf", tmp_path / "out")


def test_a_source_that_is_nothing_says_what_it_may_be(tmp_path):
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="give a run folder"):
            export(source, tmp_path / "out")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        import_folder(tmp_path / "run", tmp_path / "out")


def test_what_cannot_be_exported_or_imported_is_refused_in_one_line(make_run, run, tmp_path, tokenizer_folder):
    _, without = make_run(num_nextn_predict_layers=0)
    with pytest.raises(ConfigError, match="fp16"):
        export(run[1], tmp_path / "out", dtype="fp16")
    with pytest.raises(ConfigError, match="no MTP layers"):
        export(without, tmp_path / "out", mtp=True)

    export(run[1], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    other = config | {"quantization_config": FP8_STORAGE | {"quant_method": "awq"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"quant_method: 'awq' is not supported"):
        import_folder(tmp_path / "hf", tmp_path / "out")

    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros(200, 48)}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head\.weight has shape \[200, 48\]"):
        import_folder(tmp_path / "hf", tmp_path / "out")

    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    with pytest.raises(ConfigError, match=r"vocab_size: 200, but the tokenizer"):
        export(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lost_tokenizer_is_named(run, tmp_path):
    alone = shutil.copytree(run[1] / "checkpoints", tmp_path / "alone" / "checkpoints") / "step-00000020"
    with pytest.raises(CheckpointError, match=r"its tokenizer .*alone/tokenizer is missing"):
        export(alone, tmp_path / "out")


def test_the_moving_average_can_be_exported(run, tmp_path):
    """It was saved as half of the weights."""
    export(run[1], tmp_path / "out", ema=True)
    average = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(average, run[0].lm_head.weight / 2)
    with pytest.raises(CheckpointError, match="no moving average"):
        export(tmp_path / "out", tmp_path / "again", ema=True)


def test_without_an_average_the_answer_is_how_to_have_one(tmp_path):
    Checkpoints(tmp_path, asynchronous=False).save(
        1, {"parameters": {"w": torch.ones(1)}}, {"recipe": {"optimizer": {"ema": None}}}
    )
    rule = "the run kept no average of its weights; set optimizer.ema before training, or leave --ema out"
    with pytest.raises(CheckpointError, match=rf"^weights .*step-00000001: {rule}$"):
        export(tmp_path / "step-00000001", tmp_path / "out", ema=True)


# Matrices of several blocks, all of them whole: what transformers dequantises rightly.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "kv_lora_rank": 96,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_hidden_layers": 2,
    "n_routed_experts": 6,
    "initializer_range": 0.06,
}


@pytest.fixture(scope="module")
def in_fp8(make_run, tmp_path_factory):
    """(model whose weights are rounded as in FP8, run folder of it as it was, its export in FP8 with MTP layers)."""
    _, folder = make_run(**WIDE)
    out = tmp_path_factory.mktemp("fp8") / "hf"
    export(folder, out, dtype="fp8", mtp=True, max_shard_bytes=400_000)
    rounded = small_model(vocab_size=VOCABULARY, **WIDE)
    for key, tensor in to_hf(rounded.state_dict().items(), rounded.config, mtp=False):
        if IN_FP8.fullmatch(key):  # in place, through views of stacked experts
            data, scale = (tensor for _, tensor in quantized(key, tensor))
            scale = scale.kron(torch.ones(128, 128))[: data.shape[0], : data.shape[1]]
            tensor.copy_(data.float() * scale)
        elif not is_buffer(key):
            tensor.copy_(tensor.bfloat16())
    return rounded, folder, out


def test_transformers_computes_the_same_from_fp8(in_fp8, mtp_layers):
    """On a CPU it dequantises: to the bit, so that its logits are ours."""
    model, _, out = in_fp8
    mtp_layers(2, 1)
    hf = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).float()
    state = model.state_dict()
    assert not (set(hf.state_dict()) - set(state))
    for name, tensor in hf.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert_same_model(hf, model)
    hf = AutoModelForCausalLM.from_pretrained(out)
    assert hf.dtype == hf.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    assert all(torch.equal(tensor, state[name].to(tensor.dtype)) for name, tensor in hf.state_dict().items())


def test_an_fp8_folder_says_what_it_holds(in_fp8):
    _, _, out = in_fp8
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    tensors = tensors_of(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for key, tensor in tensors.items():
        if IN_FP8.fullmatch(key):
            assert tensor.dtype == torch.float8_e4m3fn
            assert tensors[f"{key}_scale_inv"].shape == tuple(-(-size // 128) for size in tensor.shape)
        else:
            assert tensor.dtype == (torch.float32 if is_buffer(key) or key.endswith("_scale_inv") else torch.bfloat16)
    in_mtp = "model.layers.2."
    assert {tensors[in_mtp + key].dtype for key in ("mlp.experts.5.up_proj.weight", "self_attn.o_proj.weight")} == {
        torch.float8_e4m3fn
    }
    for key in ("eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight", "mlp.gate.weight"):
        assert tensors[in_mtp + key].dtype == torch.bfloat16


def test_an_import_of_fp8_is_the_rounded_model_and_leaves_as_the_same_fp8(in_fp8, tmp_path):
    model, _, out = in_fp8
    import_folder(out, tmp_path / "imported")
    state = model.state_dict()
    for name, tensor in open_weights(tmp_path / "imported").tensors():
        if not name.startswith("model.layers.2."):
            assert torch.equal(tensor, state[name]), name
    export(tmp_path / "imported", tmp_path / "again", dtype="fp8", mtp=True)
    first, again = tensors_of(out), tensors_of(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key].view(torch.uint8), again[key].view(torch.uint8)) for key in first)


def test_fp8_is_read_wherever_a_folder_is_and_not_carried_on(in_fp8, tmp_path):
    model, _, out = in_fp8
    loaded, tokenizer = load_model(out)
    assert continue_texts(loaded, tokenizer, ["Call me"], 5) == continue_texts(model, tokenizer, ["Call me"], 5)
    export(out, tmp_path / "bf16", dtype="bf16")
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    state = model.state_dict()
    assert all(
        torch.equal(tensor, state[name].bfloat16()) or is_buffer(name)
        for name, tensor in open_weights(tmp_path / "bf16").tensors()
    )


def test_the_command_writes_fp8_and_refuses_fp32_beside_it(run, tmp_path, capsys):
    command = ["export", str(run[1]), str(tmp_path / "out"), "--fp8"]
    assert main([*command, "--dtype", "fp32"]) == 2
    assert capsys.readouterr().err.startswith("rorqual: export: --fp8 with --dtype fp32; ")
    assert main(command) == 0
    assert "warning" not in capsys.readouterr().err
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {
        torch.float8_e4m3fn, torch.bfloat16, torch.float32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "named"), [(64, "layers.0.self_attn.kv_a_proj_with_mqa.weight [576, 7168]"), (128, None)]
)
def test_what_transformers_would_misread_on_a_cpu_is_named(rope, named):
    found = off_tiles(ModelConfig.from_hf(load_preset("v3")).override({"qk_rope_head_dim": rope}))
    assert found == (named and f"model.{named}")
