# SPDX-License-Identifier: Apache-2.0
"""The paper's benchmarks: OpenCompass's own data sets, with the paper's response lengths.

`datasets` is for models that continue a text, `chat_datasets` for models that answer a message;
they differ in how code is extracted from HumanEval's answers.
"""

from mmengine.config import read_base
from opencompass.datasets import humaneval_internal_v2_postprocess, humaneval_postprocess_v2
from opencompass.openicl.icl_evaluator import AccEvaluator
from opencompass.openicl.icl_inferencer import GenInferencer
from opencompass.openicl.icl_prompt_template import PromptTemplate
from opencompass.openicl.icl_retriever import FixKRetriever
from opencompass.utils.text_postprocessors import first_capital_postprocess

with read_base():
    from opencompass.configs.datasets.ARC_c.ARC_c_gen_1e0de5 import ARC_c_datasets
    from opencompass.configs.datasets.gpqa.gpqa_gen_4baadb import gpqa_datasets
    from opencompass.configs.datasets.gsm8k.gsm8k_gen_17d0dc import gsm8k_datasets
    from opencompass.configs.datasets.humaneval.humaneval_gen_8e312c import humaneval_datasets
    from opencompass.configs.datasets.math.math_gen_a58d9d import math_datasets
    from opencompass.configs.datasets.mmlu.mmlu_gen_79e572 import mmlu_datasets
    from opencompass.configs.datasets.piqa.piqa_gen_1194eb import piqa_datasets

# The paper's GPQA has five examples before the question, which OpenCompass only offers with
# perplexity evaluation; the answer is the first capital letter, as in OpenCompass's MMLU.
for _data in gpqa_datasets:
    _data["abbr"] += "_5shot"
    _choices = "Question: {question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"
    _data["infer_cfg"] = dict(
        ice_template=dict(type=PromptTemplate, template=_choices + " {answer}\n"),
        prompt_template=dict(
            type=PromptTemplate,
            template="For the multiple choice question below, please provide the correct answer "
            "option directly.\n</E>" + _choices,
            ice_token="</E>",
        ),
        retriever=dict(type=FixKRetriever, fix_id_list=[0, 1, 2, 3, 4]),
        inferencer=dict(type=GenInferencer),
    )
    _data["eval_cfg"] = dict(
        evaluator=dict(type=AccEvaluator),
        pred_postprocessor=dict(type=first_capital_postprocess),
    )

datasets = [
    *gsm8k_datasets,
    *math_datasets,
    *humaneval_datasets,
    *mmlu_datasets,
    *ARC_c_datasets,
    *piqa_datasets,
    *gpqa_datasets,
]
# Length of the canvas, which is also the number of steps: one token a step.
for _data in datasets:
    _data["infer_cfg"]["inferencer"]["max_out_len"] = 256
# As in the paper, the prompt is just the beginning of a function.
for _data in humaneval_datasets:
    _data["infer_cfg"]["inferencer"]["max_out_len"] = 512
    _data["infer_cfg"]["prompt_template"]["template"] = "{prompt}"
    _data["eval_cfg"]["pred_postprocessor"] = dict(type=humaneval_internal_v2_postprocess)

chat_datasets = [
    {**data, "eval_cfg": {**data["eval_cfg"]}} if data["abbr"] == "openai_humaneval" else data
    for data in datasets
]
for _data in chat_datasets:
    if _data["abbr"] == "openai_humaneval":
        _data["eval_cfg"]["pred_postprocessor"] = dict(type=humaneval_postprocess_v2)
