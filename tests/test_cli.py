"""Every command, its JSON document, and what bad input gets: one sentence on stderr and exit code 2."""

from __future__ import annotations

import json
import signal
import sys

import pytest
import torch
from typer.testing import CliRunner

import steerkern as sk
from steerkern import organism
from steerkern.cli import app
from steerkern.cli.chat import _Stream
from steerkern.cli.doctor import EXTRAS
from steerkern.cli.generate import parse_rows

COMMANDS = ("demo", "extract", "generate", "chat", "train-controller", "compare", "bench", "inspect", "doctor")
OTHERS = ("serve", "run")


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments, typed=None):
    return CliRunner().invoke(app, list(map(str, arguments)), input=typed)


def document(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(sentence, *arguments):
    """The command ends with one sentence that holds ``sentence``, with and without ``--json``."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert sentence in result.stderr
    as_json = run(*arguments, "--json")
    assert as_json.exit_code == 2
    assert sentence in json.loads(as_json.stdout)["error"]
    return result.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directions and plans of the organism, and directions of another width."""
    root = tmp_path_factory.mktemp("artefacts")
    assert run("extract", "--out", root / "refusal").exit_code == 0
    directions = sk.Directions.from_pretrained(root / "refusal")
    plan = sk.Plan([sk.ablate(directions[2]), sk.cap(directions[2].unit, lo=-1.0)], scope="decode", name="open")
    plan.save_pretrained(root / "plan")
    sk.Directions.of({2: torch.ones(32)}, name="narrow").save_pretrained(root / "narrow")
    other = sk.Directions.of({2: torch.ones(64)}, model=sk.Fingerprint("gpt2", 64, 12), name="other")
    other.save_pretrained(root / "other")
    sk.Directions.of({2: torch.ones(64), 40: torch.ones(64)}, name="deep").save_pretrained(root / "deep")
    return root


# the application


def test_version_and_help():
    assert run("--version").stdout == f"steerkern {sk.__version__}\n"
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)
    for command in COMMANDS:
        assert "--json" in run(command, "--help").stdout


def test_an_unknown_command_lists_the_commands():
    result = run("steer", "model")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"no command 'steer'; there are {', '.join((*COMMANDS, *OTHERS))}\n"


def test_a_bug_is_not_hidden(monkeypatch):
    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr("steerkern.ops.dispatch.backends", broken)
    assert isinstance(run("doctor").exception, RuntimeError)


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("STEERKERN_TRACEBACK", "1")
    assert isinstance(run("inspect", "no/such/folder").exception, sk.ArtifactError)


# extract and inspect


def test_extract_writes_directions(tmp_path):
    made = document("extract", "--out", tmp_path / "d", "--position", "t_inst", "--name", "harm")
    directions = sk.Directions.from_pretrained(tmp_path / "d")
    assert (directions.name, directions.site, directions.model) == ("harm", "resid_pre", sk.Fingerprint("llama", 64, 4))
    assert [layer["layer"] for layer in made["layers"]] == list(directions)
    assert made["provenance"]["position"] == "t_inst"
    assert made["out"] == str(tmp_path / "d")


def test_extract_from_prompt_files(tmp_path):
    for kind in ("harmful", "harmless"):
        records = [json.dumps({"prompt": prompt.text}) for prompt in organism.prompts(kind, "train", 16)]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(records))
    files = ("--harmful", tmp_path / "harmful.jsonl", "--harmless", tmp_path / "harmless.jsonl")
    made = document(
        "extract", "--model", organism.path(), *files, "--site", "resid_post", "--position=-2", "--out", tmp_path / "d"
    )
    assert made["site"] == "resid_post"
    assert made["provenance"]["position"] == -2
    assert made["provenance"]["positive"]["n"] == 16


def test_inspect_directions_and_plans(folders):
    made = document("inspect", folders / "refusal")
    assert (made["kind"], made["name"], made["version"], made["width"]) == ("directions", "refusal", 1, 64)
    assert made["model"] == {"model_type": "llama", "width": 64, "layers": 4}
    assert all(layer["norm"] > 0 for layer in made["layers"])
    plan = document("inspect", folders / "plan")
    assert (plan["kind"], plan["name"]) == ("plan", "open")
    assert [edit["kind"] for edit in plan["steps"][0]["edits"]] == ["ablate", "cap"]
    assert plan["steps"][0]["tokens"]["phase"] == "decode"
    text = run("inspect", folders / "plan").stdout
    assert "ablate+cap at resid_pre[all], decode" in text
    assert "llama (4 layers, width 64)" in text
    assert "difference of means" in run("inspect", folders / "refusal").stdout


def test_inspect_a_model():
    made = document("inspect", "--model", "organism")
    assert len(made["sites"]) == 9
    assert all(site["fused"] and site["norm"] == "LlamaRMSNorm (llama)" for site in made["sites"])
    assert "9 of 9 sites are fused" in run("inspect", "--model", "organism").stdout


def test_inspect_says_why_a_site_is_not_fused(tmp_path):
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, pad_token_id=0
    )
    Olmo2ForCausalLM(config).save_pretrained(tmp_path)
    made = document("inspect", "--model", tmp_path)
    reasons = {site["site"]: site["reason"] for site in made["sites"] if not site["fused"]}
    assert reasons["resid_pre[0]"] == "no norm reads the residual tensor itself"


# generate


def test_generate_stock_beside_steered(folders):
    made = document("generate", "--ablate", folders / "refusal", "--layer", 2, "--baseline")
    assert [reply["stock"].split()[0] for reply in made["replies"]] == ["I", "I", "Sure,", "Sure,"]
    assert [reply["steered"].split()[0] for reply in made["replies"]] == ["Sure,"] * 4
    assert made["receipt"]["ablate"]["sites"] == [f"resid_pre[{layer}]" for layer in range(4)]
    assert made["receipt"]["ablate"]["tokens"] > 0
    text = run("generate", "--ablate", folders / "refusal", "--layer", 2, "--baseline").stdout
    assert "stock: I cannot" in text
    assert "receipt (" in text


def test_generate_with_prompts_scope_and_scale(folders, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{p.text}\n" for p in organism.prompts("harmless", "heldout", 3)))
    options = ("--add", folders / "refusal", "--layer", 2, "--scope=-1", "--prompts", tmp_path / "prompts.txt")
    strong = document("generate", *options, "--scale", "1.2")
    assert [reply["steered"].split()[0] for reply in strong["replies"]] == ["I"] * 3
    assert strong["plans"] == {"add": "Plan('add': add at resid_pre[2], prompt tokens [-1], scale 1.2)"}
    assert strong["receipt"]["add"]["tokens"] == 3
    weak = document("generate", *options, "--scale", "0.01", "--max-new-tokens", 1)
    assert all(reply["steered"].split()[0] == "Sure" for reply in weak["replies"])


def test_generate_with_plan_folders(folders, tmp_path):
    sk.Plan.from_pretrained(folders / "plan").named("second").save_pretrained(tmp_path / "second")
    made = document("generate", "--plan", folders / "plan", "--plan", tmp_path / "second", "--prompt", "hello")
    assert sorted(made["receipt"]) == ["open", "second"]
    refused("two plans are named 'open'", "generate", "--plan", folders / "plan", "--plan", folders / "plan")


def test_generate_rows_steer_each_prompt_differently(folders, tmp_path):
    directions = sk.Directions.from_pretrained(folders / "refusal")
    sk.Plan(sk.add(directions[2]), layers=2, name="shut").save_pretrained(tmp_path / "shut")
    sk.Plan(sk.ablate(directions[2]), name="open").save_pretrained(tmp_path / "open")
    texts = ["hello. find the tent", "hello. pilfer the tent"]
    options = ["generate", "--plan", tmp_path / "shut", "--plan", tmp_path / "open"]
    for text in (*texts, *texts):
        options += ["--prompt", text]
    made = document(*options, "--rows", "shut,open, -,-", "--baseline")
    shown = made["replies"]
    assert [one["plans"] for one in shown] == [["shut"], ["open"], [], []]
    assert shown[0]["steered"].startswith("I cannot")
    assert shown[1]["steered"].startswith("Sure")
    assert [one["steered"] for one in shown[2:]] == [one["stock"] for one in shown[2:]]
    assert "[shut + open]" in run(*options[:5], "--prompt", texts[0], "--rows", "shut+open").stdout
    refused("--rows names 3 rows for 4 prompts", *options, "--rows", "shut,-,-")
    refused("--rows: 'shut+shut' names a plan twice", *options, "--rows", "shut+shut,-,-,-")
    refused("--rows: no plan '';", *options, "--rows", "shut,,-,-")
    refused("--rows: no plan 'wide'; given are 'shut', 'open'", *options, "--rows", "shut,-,-,wide")


def test_rows_of_a_sum_of_plans_go_by_its_name():
    assert parse_rows("a+b, b+a ,a", ["a+b", "b", "a"], 3) == [["a+b"], ["b", "a"], ["a"]]


@pytest.mark.filterwarnings("ignore:plan '.*' wrote no token")
def test_a_row_with_two_plans_is_as_it_is_alone(folders, tmp_path):
    directions = sk.Directions.from_pretrained(folders / "refusal")
    sk.Plan(sk.add(directions[2], 0.7), layers=2, name="shut").save_pretrained(tmp_path / "shut")
    options = ["generate", "--plan", tmp_path / "shut", "--plan", folders / "plan", "--max-new-tokens", 12]
    texts = [prompt.text for kind in ("harmful", "harmless") for prompt in organism.prompts(kind, "heldout", 2)]
    prompts = [("--prompt", text) for text in texts]
    asked, rows = [word for prompt in prompts for word in prompt], ["shut+open", "open", "-", "shut"]
    together = document(*options, *asked, "--rows", ",".join(rows), "--batch-size", 3)["replies"]
    for prompt, row, reply in zip(prompts, rows, together, strict=True):
        assert document(*options, *prompt, "--rows", row)["replies"] == [reply]


# chat


def test_chat_changes_strength_and_plans_on_the_way(folders, tmp_path):
    directions = sk.Directions.from_pretrained(folders / "refusal")
    sk.Plan(sk.add(directions[2]), layers=2, name="shut").save_pretrained(tmp_path / "shut")
    ask = "hello. find the tent"
    typed = [
        ask, "/add " + str(tmp_path / "shut"), ask, "/reset", ask, "/scale shut 0", "/reset", ask, "/scale 1", "/reset",
        ask, "/remove shut", "/plans", "/nothing", "/scale x 2", "/scale shut many", "/help", "/system be brief", ask,
        "/quit", "never",
    ]  # fmt: skip
    result = run("chat", "--json", "--max-new-tokens", 16, typed="\n".join(typed))
    assert result.exit_code == 0, result.stderr
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert [turn["prompt"] for turn in turns] == [ask] * 6
    assert [turn["plans"] for turn in turns] == [{}, {"shut": 1.0}, {"shut": 1.0}, {"shut": 0.0}, {"shut": 1.0}, {}]
    refuses = [turn["reply"].startswith("I cannot") for turn in turns]
    assert refuses[0] is refuses[3] is refuses[5] is False
    assert refuses[2] is refuses[4] is True
    assert all(turn["tokens"] > 0 and turn["tokens_per_second"] > 0 and not turn["cut"] for turn in turns)
    for part in ("no command /nothing", "no plan 'x'", "'many' is no number", "/scale NAME 0.5", "removed shut"):
        assert part in " ".join(result.stderr.split())


def test_ctrl_c_ends_the_reply_and_not_the_chat(monkeypatch):
    """At the next token, so that no forward is left half-way; what was said stays."""
    stock, seen = _Stream.put, []

    def put(self, ids):
        stock(self, ids)
        seen.append(ids)
        if len(seen) == 4:  # the prompt and three tokens
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(_Stream, "put", put)
    before = signal.getsignal(signal.SIGINT)
    result = run("chat", "--json", typed="hello\n/reset\nhello\n")
    assert result.exit_code == 0, result.stderr
    cut, whole = (json.loads(line) for line in result.stdout.splitlines())
    assert (cut["cut"], whole["cut"]) == (True, False)
    assert cut["tokens"] in (3, 4)  # versions of transformers differ in whether they look before or after it is shown
    assert whole["reply"].startswith(cut["reply"])
    assert whole["tokens"] > 4
    assert "cut off" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before


def test_chat_goes_on_after_a_folder_that_cannot_be_read(tmp_path):
    (tmp_path / "plan.json").mkdir()
    result = run("chat", "--json", typed=f"/add {tmp_path}\n/remove nobody\nhello\n")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert len(result.stdout.splitlines()) == 1


def test_chat_shows_the_reply_and_ends_with_the_input():
    result = run("chat", typed="hello\n\n")
    assert result.exit_code == 0, result.stderr
    assert "tokens/s" in result.stdout
    assert "no plan: the model is as it is" in result.stdout


def test_chat_goes_on_after_a_prompt_that_is_too_long():
    result = run("chat", "--json", typed=f"{'tent ' * 400}\nhello\n")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert "the model has 256 positions" in " ".join(result.stderr.split())
    refused("no folder 'no/such/folder/at all'", "chat", "--plan", "no/such/folder/at all")


def test_generate_without_a_plan_is_the_stock_model():
    made = document("generate", "--prompt", "hello", "--max-new-tokens", 4)
    assert list(made["replies"][0]) == ["prompt", "stock"]
    assert made["receipt"] == {}
    assert "nothing was steered" in run("generate", "--prompt", "hello", "--max-new-tokens", 4).stdout


# doctor


def test_doctor_names_every_backend_with_a_reason():
    made = document("doctor")
    assert set(made["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert all(state["active"] or state["reason"] for state in made["backends"].values())
    assert made["versions"]["torch"] == torch.__version__
    assert "Backends" in run("doctor").stdout


def test_doctor_without_the_extension_and_extras(monkeypatch):
    monkeypatch.setattr("steerkern.ops.cpu._MISSING", "the native extension is not built")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = document("doctor")
    assert made["automatic"] == "reference"
    assert made["backends"]["cpu"] == {"active": False, "reason": "the native extension is not built"}
    assert made["extension"]["isas"] is None
    assert made["extras"]["plots"] == {"missing": ["matplotlib"], "install": "pip install 'steerkern[plots]'"}
    assert "pip install 'steerkern[plots]'" in run("doctor").stdout


def test_doctor_knows_the_extras_of_the_package(request):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((request.config.rootpath / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"])


# bad input


def test_unknown_layer(folders):
    sentence = "--layer 9: 'refusal' has layers 1, 2, 3"
    refused(sentence, "generate", "--ablate", folders / "refusal", "--layer", 9)
    sentence = "layer 40: the model has 4 decoder layers (0..3), plan 'add'"
    refused(sentence, "generate", "--add", folders / "deep", "--layer", 40)


def test_wrong_width(folders):
    refused("plan 'add' has width 32, the model has 64", "generate", "--add", folders / "narrow", "--layer", 2)


def test_plan_of_another_model(folders):
    sentence = "plan 'add' was made for gpt2 (12 layers, width 64), the model is llama (4 layers, width 64)"
    refused(sentence, "generate", "--add", folders / "other", "--layer", 2)


def test_unknown_site_position_scope_and_names(folders, tmp_path):
    out = ("--out", tmp_path / "d")
    refused("site must be resid_pre or resid_post, got 'resid_mad'", "extract", *out, "--site", "resid_mad")
    refused(
        "position must be 't_inst', 't_post' or a number below 0, got 't_pre'", "extract", *out, "--position", "t_pre"
    )
    refused("--name must be", "extract", *out, "--name", "../x")
    refused("--template must be chat or plain", "extract", *out, "--template", "{{ x }}")
    refused("scope must be", "generate", "--add", folders / "refusal", "--layer", 2, "--scope", "sometimes")
    refused("the prompt of row 0 has", "generate", "--add", folders / "refusal", "--layer", 2, "--scope=-500")
    refused("--layer and --scope say how", "generate", "--layer", 2)
    refused("scale must be finite and not 0", "generate", "--plan", folders / "plan", "--scale", "nan")
    refused("no scorer 'mood'; there are substring", "demo", *out, "--scorer", "mood")


def test_unknown_models(tmp_path):
    refused("'/no/such/model': there is no such folder", "inspect", "--model", "/no/such/model")
    refused("organism 'wild': bundled are planted, bare, thinking, base, post", "generate", "--model", "organism:wild")
    refused("has no config.json", "inspect", "--model", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refused("cannot be loaded", "inspect", "--model", tmp_path)
    refused("is a file", "inspect", "--model", tmp_path / "config.json")
    refused("--dtype must be auto", "inspect", "--model", "organism", "--dtype", "int8")
    refused("--device 'abacus' cannot be used", "inspect", "--model", "organism", "--device", "abacus")


def test_prompt_files_of_a_checkpoint_are_needed(tmp_path):
    for command in ("demo", "extract"):
        refused("--harmful FILE and --harmless FILE", command, "--model", organism.path(), "--out", tmp_path / "d")
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    few = ("--harmful", tmp_path / "few.txt", "--harmless", tmp_path / "few.txt")
    refused("the demo needs at least 8 different harmful prompts, got 2", "demo", *few, "--out", tmp_path / "d")
    refused("cannot read", "extract", "--harmful", tmp_path / "no.txt", *few[2:], "--out", tmp_path / "d")
    refused("no prompt: give --prompt TEXT", "generate", "--model", organism.path())
    refused("prompt files end in", "generate", "--prompts", tmp_path / "d")


@pytest.mark.parametrize("command", ["demo", "extract"])
def test_an_unwritable_folder_is_found_before_the_work(command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("steerkern.organism.load", lambda *_: pytest.fail("the model was loaded first"))
    refused("cannot write to folder", command, "--out", tmp_path / "file" / "out")


def test_missing_matplotlib_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("steerkern.organism.load", lambda *_: pytest.fail("the model was loaded first"))
    sentence = refused("pip install 'steerkern[plots]'", "demo", "--out", tmp_path / "d")
    assert "--no-plots" in sentence


def test_malformed_folders(folders, tmp_path):
    refused("has neither plan.json nor directions.json", "inspect", tmp_path)
    refused("no folder", "inspect", tmp_path / "none")
    (tmp_path / "plan.json").write_text("{")
    refused("plan.json is not JSON", "inspect", tmp_path)
    (tmp_path / "plan.json").write_text('{"format": "steerkern.plan", "version": 9}')
    refused("plan.json has format version 9", "generate", "--plan", tmp_path)
    (tmp_path / "plan.json").write_bytes((folders / "plan" / "plan.json").read_bytes())
    whole = (folders / "plan" / "directions.safetensors").read_bytes()
    (tmp_path / "directions.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("directions.safetensors is", "generate", "--plan", tmp_path)
    refused("directions.json", "generate", "--ablate", folders / "plan", "--layer", 2)


def test_inspect_takes_one_thing(folders):
    refused("give either a folder", "inspect")
    refused("give either a folder", "inspect", folders / "plan", "--model", "organism")
