"""Predictions of fitcheck-llm, for an environment where it is installed and nothing else has to be: python with_fitcheck.py < requests.json.

A request holds `raw` (content of a config.json, complete), and what `TrainingConfig` takes. Prints a list of [tensors, process] in bytes, or a reason for none.
"""
import json, sys
from importlib.metadata import version

from fitcheck.config_parser import ModelConfig, _count_params, _parse_fields
from fitcheck.estimator import TrainingConfig, estimate
from fitcheck.gpu_db import GPU_DB


def predicted(request):
    "As the command line would, but with a config that is at hand instead of one from the hub, and so with parameters counted by its own formula."
    fields = _parse_fields(request.pop('raw'))
    model = ModelConfig(name=request.pop('name'), num_params=_count_params(fields), **vars(fields))
    try: found = estimate(model, TrainingConfig(**request), GPU_DB['h200'])
    except ValueError as e: return str(e)
    return [round((found.total_mib - found.overhead_mib) * 2**20), round(found.total_mib * 2**20)]


print(json.dumps(dict(version=version('fitcheck-llm'), found=[predicted(r) for r in json.load(sys.stdin)])))
