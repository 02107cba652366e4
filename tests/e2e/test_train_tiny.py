# SPDX-License-Identifier: Apache-2.0
"""The training example: resuming changes nothing, and the engine runs the checkpoints."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.cases import greedy_cases
from tests.e2e.server import ROOT, run_program
from tests.engines import generate, running_engine
from tests.reference import load
from tests.scripts import load as load_scripts

FOLDER = ROOT / "examples" / "train_tiny"
SCRIPTS = dict(zip(("train", "batches"), load_scripts(FOLDER, "train", "batches"), strict=True))
#: Ids of prompts are below this, which is less than the rows of the embedding table.
VOCAB = 1400


def train(*commands: list[str]) -> str:
    """Run the script's ``main`` once for each list of arguments, in one process."""
    calls = "".join(f"train.main({command!r})\n" for command in commands)
    code = f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\nimport train\n"
    program = f"{code}if __name__ == '__main__':\n    " + "    ".join(calls.splitlines(True))
    return run_program([sys.executable, "-c", program], timeout=900)


def refusal(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Return the message with which the script's arguments are refused."""
    with pytest.raises(SystemExit) as ended:
        SCRIPTS["train"].parse_arguments(list(command))
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of toy models: both families, and LLaDA again, trained in two parts."""
    folder = tmp_path_factory.mktemp("train")
    toy = ["--plan", "toy", "--no-compile", "--processes", "1"]
    train(
        [str(folder / "llada"), *toy],
        [str(folder / "parts"), *toy, "--stop-after", "3"],
        [str(folder / "parts"), *toy, "--resume"],
        [str(folder / "dream"), *toy, "--model", "dream"],
    )
    return folder


def test_resuming_gives_the_same_run(folder: Path) -> None:
    whole, parts = (load_file(folder / name / "model.safetensors") for name in ("llada", "parts"))
    assert whole.keys() == parts.keys()
    assert all(tensor.equal(parts[name]) for name, tensor in whole.items())


def test_two_processes_share_a_batch(tmp_path: Path) -> None:
    script = [sys.executable, str(FOLDER / "train.py"), str(tmp_path), "--plan", "toy"]
    command = [*script, "--no-compile", "--stop-after", "2"]
    run_program(command, timeout=900)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--no-compile", "--seed", "5"], "seed=0, not 5"), ([], "compile=False, not True")],
)
def test_another_run_is_not_resumed(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = ["--plan", "toy", "--processes", "1", "--resume", *options]
    assert message in refusal(capsys, str(folder / "llada"), *state)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_engine_equals_reference(folder: Path, family: str) -> None:
    """Checkpoints have the public layout: two independent readers agree on it."""
    path = str(folder / family)
    cases = greedy_cases(21, VOCAB)[::7]
    with running_engine(path) as llm:
        outputs = generate(llm, [c.prompt for c in cases], [c.sampling() for c in cases])
    reference = load(path)
    assert outputs == [case.expected(reference) for case in cases]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--stop-after", "0"], "--stop-after must be at least 1, got 0"),
        (["--save-every", "0"], "--save-every must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be from 0 to 2**63 - 1, got -1"),
        (["--report-every", "nan"], "--report-every must be above 0, got nan"),
        (
            ["--no-compile", "--processes", "1", "--resume", "--stop-after", "2"],
            "--stop-after must be above the state's 8, 2 is not",
        ),
        ([], "has a run: go on with it by --resume, or remove it"),
    ],
)
def test_bad_arguments(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, str(folder / "llada"), "--plan", "toy", *options)


def test_a_broken_state_and_a_path_below_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "state.pt"
    file.write_text("junk")
    told = refusal(capsys, str(tmp_path), "--plan", "toy", "--resume")
    assert f"--resume: {file} is no state of a run" in told
    told = refusal(capsys, str(file / "below"), "--plan", "toy")
    assert f"output must be a directory, {file} is none" in told


def test_plans_are_as_documented() -> None:
    """The READMEs of the example and of the embedded models state each plan's number of steps."""
    for family, steps in (("llada", 3700), ("dream", 4600)):
        assert SCRIPTS["train"].PLANS[family].steps == steps
        for readme in (
            FOLDER / "README.md",
            ROOT / "vllm_sparse_dllm" / "assets" / f"tiny-{family}" / "README.md",
        ):
            assert f"{steps:,} steps" in readme.read_text(encoding="utf-8")


def test_cycles_have_rates_and_decay_of_their_own() -> None:
    train, batches = SCRIPTS["train"], SCRIPTS["batches"]
    plan, vocabulary = train.PLANS["toy"], train.Vocabulary(train.TOKENIZER)
    assert [plan.schedule(step)[1] for step in (0, 3, 4, 7, 8)] == [0, 0, 0.1, 0.1, 0]
    factors = [plan.schedule(step)[0] for step in range(9)]
    # Each cycle has two steps of warm-up; the cooldown of the second takes all of its steps.
    assert factors == pytest.approx([0.5, 1, 1, 0.625, 0.25, 0.375, 0.25, 0.125, 0])
    training = train.Training(plan, "dream", "wired", vocabulary, 0)
    data = batches.Batches(vocabulary, plan.stages, 64, 0)
    decays = []
    for step in (3, 4):
        training.step = step
        training.update(training.network, data[step])
        decays.append([one.param_groups[0]["weight_decay"] for one in training.optimisers])
    # Weight decay is Muon's, for the hidden matrices, and never Adam's.
    assert decays == [[0, 0], [0.1, 0]]


def test_half_way_responses() -> None:
    """With ``in_order`` 1, half-way responses show the start of an answer; with 0, random words."""
    batches, vocabulary = (
        SCRIPTS["batches"],
        SCRIPTS["train"].Vocabulary(SCRIPTS["train"].TOKENIZER),
    )
    mask, ends = vocabulary["<|mask|>"], {vocabulary[batches.END], vocabulary["<|endoftext|>"]}
    gaps = {}
    for in_order in (0.0, 1.0):
        stage = batches.Stage(20, {64: 1.0}, mix={"copy": 1.0}, in_order=in_order)
        data = batches.Batches(vocabulary, (stage,), 64 * 32, 0)
        shown = gaps[in_order] = []
        for batch in (data[number] for number in range(len(data))):
            for ids, targets in zip(batch.ids[:, -batches.RESPONSE :], batch.targets, strict=True):
                # Half-way responses, and some nearly full ones, show the end of padding.
                if int((ids[-12:] == mask).sum()) == 0:
                    answer = [int(t) not in ends for t in targets]
                    seen = (ids != mask)[torch.tensor(answer)].int()
                    shown.append(bool((seen.diff() > 0).any()))
    assert sum(gaps[0.0]) > 100
    assert sum(gaps[1.0]) < sum(gaps[0.0]) / 4


@pytest.mark.parametrize(
    ("family", "start", "least", "most"),
    [("llada", "wired", 0.8, 1.0), ("dream", "wired", 0.4, 1.0), ("dream", "random", 0.0, 0.1)],
)
def test_wired_start(family: str, start: str, least: float, most: float) -> None:
    """Before any training, the circuit fills in a masked word in the copy of a list."""
    train, batches, length, num = SCRIPTS["train"], SCRIPTS["batches"], 96, 40
    vocabulary, rng = train.Vocabulary(train.TOKENIZER), random.Random(5)
    network = train.Training(train.PLANS[family], family, start, vocabulary, 0).network
    ids = torch.full((num, length + batches.RESPONSE), vocabulary["<|endoftext|>"])
    places = []
    for row in ids:
        item = batches.make_item(rng, "copy", length)
        words = torch.tensor(vocabulary.encode((*item.prompt, *item.answer, batches.END)))
        row[: len(words)] = words
        # Neither the first nor the last: its neighbours are words.
        places.append(rng.randrange(1, len(item.answer) - 1))
    masked = [length + place for place in places]
    right = ids[range(num), masked].clone()
    ids[range(num), masked] = vocabulary["<|mask|>"]
    with torch.inference_mode():
        filled = network(ids, batches.RESPONSE)[range(num), places].argmax(-1)
    assert least <= (filled == right).float().mean() <= most
