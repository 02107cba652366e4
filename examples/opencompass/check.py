# SPDX-License-Identifier: Apache-2.0
"""Check the configurations of this folder against the installed OpenCompass.

Each configuration is loaded, written out and loaded again, as OpenCompass itself does before a run;
OpenCompass's registries must then have every class and function that it names, and every prompt
must have a place for each input column of its data set. With ``--base-url``, each model class also
asks a server one question, and the answer is printed as one JSON object per configuration.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from mmengine.config import Config
from opencompass import registry
from opencompass.utils import build_model_from_cfg
from opencompass.utils.prompt import PromptList, safe_format

FOLDER = Path(__file__).parent
CONFIGS = ("llada_8b_instruct", "llada_1_5", "dream_v0_base_7b", "dream_v0_instruct_7b")
#: Data sets of each configuration: their number by the beginning of their names.
BENCHMARKS = {
    "gsm8k": 1,
    "math": 1,
    "openai_humaneval": 1,
    "lukaemon_mmlu_": 57,
    "ARC-c": 1,
    "piqa": 1,
    "GPQA_": 1,
}
LENGTH, CODE_LENGTH = 256, 512


def load(name: str) -> Config:
    """Return a configuration as OpenCompass's tasks receive it, with names in place of classes."""
    config = Config.fromfile(str(FOLDER / f"{name}.py"), format_python_code=False)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "config.py"
        config.dump(str(written))
        return Config.fromfile(str(written), format_python_code=False)


def resolve(where: Any, entry: Any, kind: str) -> Any:
    """Return the class or function that an entry's ``type`` names.

    Raises:
        ValueError: If the registry does not have it.
    """
    name = entry["type"] if isinstance(entry, dict) else entry
    found = name if callable(name) else where.get(name)
    if found is None:
        raise ValueError(f"OpenCompass has no {kind} {name!r}")
    return found


def check_data(data: Any) -> str:
    """Check everything that a data set names, return the prompt of a made-up row."""
    resolve(registry.LOAD_DATASET, data, "data set")
    infer, evaluate = data["infer_cfg"], data["eval_cfg"]
    resolve(registry.ICL_RETRIEVERS, infer["retriever"], "retriever")
    resolve(registry.ICL_INFERENCERS, infer["inferencer"], "inferencer")
    resolve(registry.ICL_EVALUATORS, evaluate["evaluator"], "evaluator")
    if "pred_postprocessor" in evaluate:
        name = evaluate["pred_postprocessor"]
        resolve(registry.TEXT_POSTPROCESSORS, name, "post-processor")
    expected = CODE_LENGTH if data["abbr"] == "openai_humaneval" else LENGTH
    if infer["inferencer"]["max_out_len"] != expected:
        raise ValueError(f"{data['abbr']}: max_out_len must be {expected}")
    prompt = registry.ICL_PROMPT_TEMPLATES.build(infer["prompt_template"])
    columns = data["reader_cfg"]["input_columns"]
    row = {column: f"<<{column}>>" for column in columns}
    text = str(prompt.generate_item(row))
    missing = [value for value in row.values() if value not in text]
    if missing:
        raise ValueError(f"{data['abbr']}: the prompt has no place for {missing}")
    if "ice_template" in infer:
        registry.ICL_PROMPT_TEMPLATES.build(infer["ice_template"])
        answer = {**row, data["reader_cfg"]["output_column"]: "<<answer>>"}
        if "<<answer>>" not in safe_format(infer["ice_template"]["template"], **answer):
            raise ValueError(f"{data['abbr']}: the examples have no answers")
    return text


def check(name: str) -> Config:
    """Check a configuration and return it."""
    config = load(name)
    names = [data["abbr"] for data in config["datasets"]]
    for beginning, number in BENCHMARKS.items():
        found = sum(abbr.startswith(beginning) for abbr in names)
        if found != number:
            raise ValueError(f"{name}: {found} data sets {beginning}*, not {number}")
    if len(names) != len(set(names)) or len(names) != sum(BENCHMARKS.values()):
        raise ValueError(f"{name}: other data sets than the paper's, or one twice: {names}")
    for data in config["datasets"]:
        check_data(data)
    for model in config["models"]:
        resolve(registry.MODELS, model, "model")
    for stage in ("infer", "eval"):
        resolve(registry.PARTITIONERS, config[stage]["partitioner"], "partitioner")
        resolve(registry.RUNNERS, config[stage]["runner"], "runner")
        resolve(registry.TASKS, config[stage]["runner"]["task"], "task")
    return config


def ask(model: Any, base_url: str, name: str, tokenizer: str, question: str) -> str:
    """Ask a server through a configuration's model class, return the answer."""
    model = copy.deepcopy(model)
    model.update(openai_api_base=base_url, path=name, tokenizer_path=tokenizer)
    prompt = PromptList([{"role": "HUMAN", "prompt": question}])
    client = build_model_from_cfg(model)
    return client.generate_from_template([prompt], max_out_len=model["max_out_len"])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base-url", help="of a server to ask, with the /v1 at its end")
    parser.add_argument("--model", help="its name on that server")
    parser.add_argument("--tokenizer", help="its checkpoint's directory")
    parser.add_argument("--question", default="What is 2 + 2?", help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.base_url and not (arguments.model and arguments.tokenizer):
        parser.error("--base-url needs --model and --tokenizer")
    for name in CONFIGS:
        config = check(name)
        print(f"{name}: {len(config['datasets'])} data sets, {config['models'][0]['abbr']}")
        if arguments.base_url:
            where = (arguments.base_url, arguments.model, arguments.tokenizer)
            answer = ask(config["models"][0], *where, arguments.question)
            print(json.dumps({"config": name, "answer": answer}), flush=True)


if __name__ == "__main__":
    main()
