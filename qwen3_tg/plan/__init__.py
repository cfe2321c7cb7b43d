"""How much memory a model takes, before it is loaded or even downloaded.

memory.py adds up, scratch.py estimates what the graphs need, forms.py knows what a model would be
in any format, released.py the shapes of the released models, source.py finds the model that was
meant. Weights and cache are exact to the byte; no tinygrad here.
"""

from qwen3_tg.plan.forms import FORMS, check_form, stored_as
from qwen3_tg.plan.memory import Plan, Use, largest_context, make_plan
from qwen3_tg.plan.released import CONFIGS, Released, find_released
from qwen3_tg.plan.scratch import ModelSize, load_factor, save_factor, scratch_bytes
from qwen3_tg.plan.source import Source, find_source

__all__ = [
    "CONFIGS",
    "FORMS",
    "ModelSize",
    "Plan",
    "Released",
    "Source",
    "Use",
    "check_form",
    "find_released",
    "find_source",
    "largest_context",
    "load_factor",
    "make_plan",
    "save_factor",
    "scratch_bytes",
    "stored_as",
]
