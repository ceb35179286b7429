"""Kept results: an interrupted run goes on where it stopped, and nothing of another model is taken for ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steerkern as sk
from steerkern import organism
from steerkern.kept import FILE, Kept
from steerkern.subject import Subject


def test_values_come_back_and_a_cut_line_is_dropped(tmp_path):
    model = nn.Linear(3, 3)
    kept = Kept(tmp_path, model)
    key = kept.key(["a", 1])
    assert kept.get(key) is None
    kept.put(key, ["yes"])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"key": "half')
    again = Kept(tmp_path, model)
    assert again.get(again.key(["a", 1])) == ["yes"]
    again.put("other", 2)
    assert Kept(tmp_path, model).get("other") == 2


def test_another_model_has_other_keys(tmp_path):
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    assert Kept(tmp_path, one).key("a") == Kept(tmp_path, one).key("a")
    assert Kept(tmp_path, one).key("a") != Kept(tmp_path, two).key("a")


def test_a_file_that_is_none_of_ours_is_not_touched(tmp_path):
    (tmp_path / FILE).write_text("something else\n")
    with pytest.raises(sk.ArtifactError, match=r"kept.jsonl line 1: no kept value"):
        Kept(tmp_path, nn.Linear(3, 3))
    assert (tmp_path / FILE).read_text() == "something else\n"


def test_an_interrupted_run_asks_only_what_it_has_not_asked(tmp_path, monkeypatch):
    model, tokenizer = organism.load()
    prompts = [prompt.messages for prompt in organism.prompts("harmful", "heldout", 4)]
    plan = sk.Plan(sk.add(torch.ones(64)), layers=2)
    questions = [(None, prompts), (plan, prompts), (plan.scaled(0.5), prompts[:2])]

    def subject():
        return Subject(model, tokenizer, "organism", kept=Kept(tmp_path, model))

    whole = subject().replies("asking", questions)
    assert [len(group) for group in whole] == [4, 4, 2]
    monkeypatch.setattr(Subject, "ask", lambda *_: pytest.fail("asked again"))
    assert subject().replies("asking", questions) == whole
    monkeypatch.undo()
    lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
    (tmp_path / FILE).write_text(lines[0])
    asked = []
    ask = Subject.ask
    monkeypatch.setattr(Subject, "ask", lambda self, label, some: (asked.append(len(some)), ask(self, label, some))[1])
    assert subject().replies("asking", questions) == whole
    assert asked == [2]
