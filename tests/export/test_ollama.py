"""Modelfiles: templates in Go against the model's own in Jinja, stop words, parameters; and the folders."""

import json
import shutil
import subprocess

import gguf
import pytest

from lora_jax import get_peft_model
from lora_jax.export.ollama import chat_format, go_template, modelfile, save_ollama
from lora_jax.loading import load_tokenizer
from tests import test_chat, tiny
from tests.test_chat import byte_level

# A system message of its own unless one is given, as Qwen 2.5's and SmolLM2's.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    + test_chat.CHATML
)
# As Gemma 2's: no system message, the answering role is called otherwise.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# As Mistral's: the system message stands in the last message of the user.
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(s='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.s = m['content'] + '\n\n' %}{% elif m['role'] == 'user' %}"
    "{{ '[INST] ' + (ns.s if loop.last else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_IN = {"LLAMA2": "first", "MISTRAL": "last"}
WITHOUT_SYSTEM = ("GEMMA", "TEKKEN")
NAMES = ("CHATML", "LLAMA3", "LLAMA2", "YI", "TEKKEN", "DROPS_EARLIER", "EOS_AT_END", "NO_EOS", "GENERATION")
TEMPLATES = {name: getattr(test_chat, name) for name in NAMES}
TEMPLATES |= {"DEFAULT_SYSTEM": DEFAULT_SYSTEM, "GEMMA": GEMMA, "MISTRAL": MISTRAL}
CHATS = [
    ("user",),
    ("user", "assistant", "user"),
    ("user", "assistant"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
]


def tokenizer_of(template: str):
    specials = ["<|x|>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    return byte_level(template, specials, bos="<bos>", eos="<eos>", adds_bos=True)


def chat(roles: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"role": role, "content": f'é "{i}" {{{{ .x }}}}\nof the {role}'} for i, role in enumerate(roles)]


def chats_of(name: str) -> list[list[dict[str, str]]]:
    return [chat(roles) for roles in CHATS if "system" not in roles or name not in WITHOUT_SYSTEM]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_stands_between_messages(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    found = chat_format(tokenizer, adds_bos=True)
    assert found.system_in == SYSTEM_IN.get(name, "")
    assert (found.system is None) == (name in WITHOUT_SYSTEM)
    for messages in chats_of(name):
        if messages[-1]["role"] == "user":
            want = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert found.render(messages) == want.removeprefix("<bos>")


def test_the_template_in_go():
    found = chat_format(tokenizer_of(DEFAULT_SYSTEM), adds_bos=True)
    assert go_template(found) == (
        r"""{{ if .System }}{{ "<|im_start|>system\n" }}{{ $.System }}{{ "<|im_end|>\n" }}"""
        r"""{{ else }}{{ "<|im_start|>system\nBe kind.<|im_end|>\n" }}{{ end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}{{ "<|im_start|>user\n" }}{{ .Content }}{{ "<|im_end|>\n" }}"""
        r"""{{ if $last }}{{ "<|im_start|>assistant\n" }}{{ end }}
{{- else if eq .Role "assistant" }}{{ "<|im_start|>assistant\n" }}{{ .Content }}"""
        r"""{{ if not $last }}{{ "<|im_end|>\n" }}{{ end }}
{{- end }}
{{- end }}"""
    )


GO = """package main
import ("encoding/json"; "os"; "strings"; "text/template")
type Case struct { Template, System string; Messages []struct{ Role, Content string } }
func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	out := []string{}
	for _, c := range cases {
		var b strings.Builder
		if err := template.Must(template.New("").Parse(c.Template)).Execute(&b, c); err != nil { panic(err) }
		out = append(out, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


def test_go_renders_the_same(tmp_path):
    """Where Go is installed: its text/template, given messages as Ollama gives them."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("needs Go")
    cases, wanted = [], []
    for name, template in TEMPLATES.items():
        found = chat_format(tokenizer_of(template), adds_bos=True)
        for messages in chats_of(name):
            system = "".join(m["content"] for m in messages if m["role"] == "system")
            cases.append({"Template": go_template(found), "System": system, "Messages": messages})
            wanted.append(found.render(messages))
    (tmp_path / "main.go").write_text(GO)
    command = [go, "run", str(tmp_path / "main.go")]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == wanted


def test_modelfile(capfd):
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 0], "max_length": 7}
    tokenizer = tokenizer_of(test_chat.CHATML)
    text = modelfile("./a b.gguf", tokenizer, settings, 131072, adapter="./lora.gguf")
    before, template, after = text.split('"""')
    assert before == "FROM ./a b.gguf\nADAPTER ./lora.gguf\nTEMPLATE "
    assert template == go_template(chat_format(tokenizer, adds_bos=True))
    assert after.split("\n")[1:-1] == [
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.9",
        "PARAMETER num_ctx 8192",
        'PARAMETER stop "<eos>"',
        'PARAMETER stop "<|x|>"',
        'PARAMETER stop "<|im_end|>"',
    ]
    assert "temperature" not in modelfile("x", tokenizer, {"temperature": 0.6}, 64)  # greedy
    assert capfd.readouterr().err == ""


def test_bos_stays_where_the_runner_adds_none():
    tokenizer = byte_level(test_chat.TEKKEN, ["<bos>", "<eos>"], bos="<bos>", eos="<eos>")
    assert chat_format(tokenizer, adds_bos=False).start == "<bos>"
    assert "<bos>" in modelfile("x", tokenizer, {}, 64)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "leaves out a message, or moves it"),
        (test_chat.CHATML + "{{ messages | length }}", "otherwise than one of three"),
        ("{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}!", "messages of user, assistant, user"),
        ("{{ raise_exception('never') }}", "refuses messages of user: never"),
    ],
)
def test_templates_that_do_more_are_announced(template, message, capfd):
    tokenizer = tokenizer_of(template)
    with pytest.raises(ValueError, match=message):
        chat_format(tokenizer, adds_bos=True)
    assert "TEMPLATE" not in modelfile("x", tokenizer, {}, 64)
    assert message in capfd.readouterr().err


def test_notes(capfd):
    modelfile("x", tokenizer_of(GEMMA), {}, 64)
    assert "takes no system message" in capfd.readouterr().err
    modelfile("x", tokenizer_of("{{ strftime_now('%d %b %Y') }}" + test_chat.CHATML), {}, 64)
    assert "states today's date" in capfd.readouterr().err


def test_folders(tmp_path):
    folder = tiny.write_folder(tmp_path / "model")
    model = tiny.randomize_adapter(get_peft_model(tiny.open_model(folder), r=4, verbose=False))
    with pytest.raises(ValueError, match="as_adapter=True"):
        save_ollama(model, tmp_path / "out", base="llama")
    tokenizer = load_tokenizer(folder)
    save_ollama(model, tmp_path / "merged", tokenizer, "f16", verbose=False)
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {"Modelfile", "model.F16.gguf"}
    text = (tmp_path / "merged" / "Modelfile").read_text()
    assert text.startswith("FROM ./model.F16.gguf\nTEMPLATE") and text.endswith(
        'stop "<|end|>"\nPARAMETER stop "<|eot|>"\n'
    )
    save_ollama(model, tmp_path / "apart", tokenizer, "f32", as_adapter=True, verbose=False)
    text = (tmp_path / "apart" / "Modelfile").read_text()
    assert text.startswith("FROM ./model.F32.gguf\nADAPTER ./model-lora.F32.gguf\n")
    save_ollama(model, tmp_path / "named", tokenizer, as_adapter=True, base="llama3.2:1b", verbose=False)
    assert (
        (tmp_path / "named" / "Modelfile").read_text().startswith("FROM llama3.2:1b\nADAPTER ./model-lora.F32.gguf\n")
    )
    # FROM is the base without its adapter.
    (tensor,) = (t for t in gguf.GGUFReader(tmp_path / "apart" / "model.F32.gguf").tensors if "1.ffn_down" in t.name)
    base = tiny.open_model(folder).module.slots()["model.layers.1.mlp.down_proj.weight"]
    assert (tensor.data == base.variable.get_value()[1]).all()
