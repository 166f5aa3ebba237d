"""What follows a training run: merging, answering, planning, on a tiny model and tokenizer made here."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from axolotl.cli.answering import GENERATION_DEFAULTS, Answerer, read_prompt_format
from axolotl.cli.inference import choose_source, get_multi_line_input
from axolotl.cli.main import run
from axolotl.exceptions import ConfigError, ModelError
from axolotl.utils.dict import DictDefault

SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random Llama and a byte-level tokenizer that puts `<s>` before a text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path_factory.mktemp("base")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([], trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet))
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def write_adapter(base, folder):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


@pytest.fixture
def config(base, tmp_path):
    """Writes the config of a LoRA run; keyword arguments change it."""

    def write(**changes):
        rows = [{"instruction": f"say {n}", "input": "", "output": f"{n}"} for n in range(40)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        written = {
            "base_model": str(base), "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True,
            "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "alpaca"}], "sequence_len": 256,
            "micro_batch_size": 2, "gradient_accumulation_steps": 1, "num_epochs": 1, "learning_rate": 1e-3,
            "output_dir": str(tmp_path / "out"), "dataset_prepared_path": str(tmp_path / "prepared"), "bf16": False,
            "optimizer": "adamw_torch", "special_tokens": {"pad_token": "<pad>"}, "seed": 1,
        } | changes  # fmt: skip
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump({key: value for key, value in written.items() if value is not None}))
        return path

    return write


# merge-lora


def test_merge_lora_writes_a_model_that_loads_alone(config, base, tmp_path):
    write_adapter(base, tmp_path / "out")
    assert run(["merge-lora", str(config(flash_attention=True, load_in_8bit=True)), "--dequant"]) == 0
    merged = tmp_path / "out" / "merged"
    assert AutoTokenizer.from_pretrained(merged).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    ids = torch.arange(10, 30)[None]
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(merged)(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4
    )


def test_merge_lora_of_a_qlora_run_keeps_the_four_bit_base(config, base, tmp_path):
    pytest.importorskip("bitsandbytes")
    write_adapter(base, tmp_path / "out")
    path = config(adapter="qlora", load_in_4bit=True)
    assert run(["merge-lora", str(path)]) == 0
    four_bit = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").state_dict()
    assert run(["merge-lora", str(path), "--dequant"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert 1e-3 < (four_bit[name] - plain[name]).abs().mean() < 1e-2


def test_merge_lora_names_what_is_missing(config, tmp_path, capsys):
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    assert run(["merge-lora", str(config())]) == 1
    message = capsys.readouterr().err
    assert "adapter_config.json" in message and "checkpoint-7" in message and "Traceback" not in message
    assert run(["merge-lora", str(config(adapter=None, lora_r=None, lora_alpha=None, lora_target_linear=None))]) == 1
    assert "adapter" in capsys.readouterr().err


# which weights answer


def test_the_newest_result_answers(base, tmp_path):
    out = tmp_path / "out"
    cfg = DictDefault(base_model=str(base), adapter="lora", output_dir=str(out))
    assert choose_source(cfg).base_model == str(base) and "nothing trained" in choose_source(cfg).what
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(out / "merged")
    assert choose_source(cfg).base_model == str(out / "merged")
    write_adapter(base, out / "checkpoint-3")
    (out / "checkpoint-3/trainer_state.json").write_text("{}")
    shutil.copy(out / "checkpoint-3/adapter_config.json", out)  # of a run that has just begun
    shutil.rmtree(out / "merged")
    assert choose_source(cfg).adapter == str(out / "checkpoint-3")
    write_adapter(base, out)
    assert choose_source(cfg).adapter == str(out)
    assert choose_source(cfg, base_model="elsewhere").adapter is None
    assert choose_source(cfg, lora_model_dir="hub/adapter").adapter == "hub/adapter"
    with pytest.raises(ModelError, match="holds no adapter"):
        choose_source(cfg, lora_model_dir=str(base))


def test_a_fully_trained_model_answers_itself(base, tmp_path):
    cfg = DictDefault(base_model=str(base), output_dir=str(tmp_path / "out"))
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "out")
    assert choose_source(cfg).base_model == str(tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "out/merged")  # left by an adapter's run
    assert choose_source(cfg).base_model == str(tmp_path / "out")


# prompts


def test_an_instruction_prompt_is_the_training_prompt(tokenizer):
    from axolotl.prompt_strategies import load

    cfg = DictDefault(sequence_len=256, datasets=[{"path": "x", "type": "alpaca"}])
    row = load("alpaca", tokenizer, cfg).tokenize_prompt({"instruction": "add", "input": "", "output": "three"})
    prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert read_prompt_format(cfg, tokenizer).encode([{"role": "user", "content": "add"}]) == prompt


def test_a_chat_prompt_is_the_training_prompt(tokenizer):
    from axolotl.prompt_strategies import load

    dataset = {"path": "x", "type": "chat_template", "chat_template": "jinja", "chat_template_jinja": TEMPLATE}
    cfg = DictDefault(sequence_len=256, datasets=[dataset])
    messages = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "three"}]
    row = load("chat_template", tokenizer, cfg, cfg.datasets[0]).tokenize_prompt({"messages": messages})
    prompt_format = read_prompt_format(cfg, tokenizer)
    prompt = prompt_format.encode(messages[:1])
    assert row["input_ids"][: len(prompt)] == prompt
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert prompt_format.stop_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("prompter", ["None", "none"])
def test_no_prompter_reads_the_text_as_typed(tokenizer, prompter):
    cfg = DictDefault(datasets=[{"path": "x", "type": "alpaca"}], chat_template="chatml")
    prompt = read_prompt_format(cfg, tokenizer, prompter).encode([{"role": "user", "content": "<s>hello"}])
    assert prompt == tokenizer("hello")["input_ids"]  # a BOS typed by hand is not doubled


def test_a_prompter_can_be_named(tokenizer):
    text = tokenizer.decode(read_prompt_format(DictDefault(), tokenizer, "AlpacaPrompter").encode([{"content": "add"}]))
    assert text.startswith("<s>Below is an instruction") and text.endswith("### Response:\n")
    with pytest.raises(ConfigError, match="AlpacaPrompter"):
        read_prompt_format(DictDefault(), tokenizer, "NoSuchPrompter")


# answers


@pytest.fixture
def answerer(base, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base)
    answerer = Answerer(model, tokenizer, read_prompt_format(DictDefault(), tokenizer, "None"))
    answerer.options |= {"max_new_tokens": 12, "seed": 3}
    return answerer


def test_pieces_make_the_whole_and_a_seed_repeats_it(answerer):
    pieces: list[str] = []
    messages = [{"role": "user", "content": "hello"}]
    whole = answerer.answer(messages, pieces.append)
    assert whole and "".join(pieces) == whole
    assert answerer.answer(messages, pieces.append) == whole
    assert list(answerer.stream(messages))[-1] == whole


def test_the_end_of_a_turn_stops_the_answer(answerer):
    """A head of zeros always says token 0: nothing is answered when that token ends a turn, else it goes on to the limit."""
    lengths = []
    torch.nn.init.zeros_(answerer.model.lm_head.weight)
    answerer.options |= {"temperature": 0.0, "repetition_penalty": 1.0}
    for stops in ([], [0]):
        answerer.format.stop_ids[:] = stops
        config = answerer._generation_config(3)
        ids = torch.tensor([[5, 6, 7]])
        lengths.append(
            answerer.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config).shape[1] - 3
        )
    assert lengths == [12, 1]


def test_a_prompt_that_fills_the_window_is_refused(answerer):
    from axolotl.exceptions import AxolotlError

    with pytest.raises(AxolotlError, match="no room"):
        answerer.answer([{"role": "user", "content": "x" * 300}], lambda _: None)
    with pytest.raises(AxolotlError, match="no room"):
        list(answerer.stream([{"role": "user", "content": "x" * 300}]))
    answerer.answer([{"role": "user", "content": "x" * 250}], lambda _: None)


def test_all_of_a_piped_prompt_is_one_prompt(monkeypatch, tmp_path):
    (tmp_path / "prompt").write_text("first\nsecond\n")
    with (tmp_path / "prompt").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert get_multi_line_input() == "first\nsecond\n"


def test_a_piped_prompt_is_answered_on_standard_output(config, base, tmp_path, monkeypatch, capsys):
    write_adapter(base, tmp_path / "out")
    monkeypatch.setitem(GENERATION_DEFAULTS, "max_new_tokens", 5)
    (tmp_path / "prompt").write_text("say 3\n")
    with (tmp_path / "prompt").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert run(["inference", str(config()), "--launcher", "python"]) == 0
    answer = capsys.readouterr().out
    assert answer.strip() and "Below is" not in answer
    with (tmp_path / "config.yml").open() as stream:
        stream.seek(0, 2)
        monkeypatch.setattr(sys, "stdin", stream)
        assert run(["inference", str(config()), "--launcher", "python"]) == 1
    assert "no prompt" in capsys.readouterr().err


def test_gradio_is_asked_for_before_the_model_is_loaded(config, capsys):
    if importlib.util.find_spec("gradio"):
        pytest.skip("gradio is installed")
    assert run(["inference", str(config()), "--gradio", "--launcher", "python"]) == 1
    assert "axolotl[gradio]" in capsys.readouterr().err


# plan


def test_plan_counts_the_run(config, capsys):
    assert run(["plan", str(config()), "--gpu", "h200"]) == 0
    text = capsys.readouterr().out
    assert "40 to train" in text and "steps       20" in text and "fits h200" in text


def test_plan_names_what_is_chosen_on_the_gpu_that_is_named(config, capsys):
    path = str(config(adapter="lora", lora_r=4, lora_target_linear=True, bf16="auto", tf32="auto"))
    chosen = {}
    for gpu in ("h200", "t4"):
        assert run(["plan", path, "--gpu", gpu]) == 0
        lines = (line.split() for line in capsys.readouterr().out.splitlines())
        chosen[gpu] = {line[0]: line[1] for line in lines if len(line) > 1}
    keys = ("bf16", "tf32", "lora_mlp_kernel", "lora_qkv_kernel", "torch_compile")
    assert [chosen["h200"].get(key) for key in keys] == ["True"] * 5
    assert [chosen["t4"].get(key) for key in keys] == ["False", "False", "True", "True", "True"]
    assert chosen["t4"]["fp16"] == "True"


def test_plan_fails_with_a_remedy_when_memory_is_short(config, base, tmp_path, capsys):
    big = tmp_path / "big"
    LlamaConfig(vocab_size=261, hidden_size=4096, intermediate_size=14336, num_hidden_layers=8).save_pretrained(big)
    AutoTokenizer.from_pretrained(base).save_pretrained(big)
    path = config(base_model=str(big), sequence_len=8192, pad_to_sequence_len=True, tokenizer_config=str(base))
    assert run(["plan", str(path), "--memory", "24GiB"]) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text and "gradient_checkpointing: true" in text
    assert run(["plan", str(path), "--gpu", "h999"]) == 1
    assert "h200" in capsys.readouterr().err
