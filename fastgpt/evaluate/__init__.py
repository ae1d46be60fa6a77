"""Knowing whether it worked: perplexity, multiple choice by likelihood, responses and their scores."""

from fastgpt.evaluate.judge import Judge
from fastgpt.evaluate.multiple_choice import log_likelihoods, multiple_choice, read_questions
from fastgpt.evaluate.perplexity import perplexity
from fastgpt.evaluate.responses import exact_match, rouge_l
from fastgpt.evaluate.run import EvalConfig, evaluate

__all__ = [
    "EvalConfig",
    "Judge",
    "evaluate",
    "exact_match",
    "log_likelihoods",
    "multiple_choice",
    "perplexity",
    "read_questions",
    "rouge_l",
]
