"Every fault that the doctor knows, on facts of a machine that has it: what it says, and that there is a cure."
import subprocess
import sys

import pytest

from homelab_ft.core import GiB
from homelab_ft.hardware.doctor import Facts, collect_facts, diagnose
from homelab_ft.hardware.gpu import Process


def machine(**changes):
    "A home GPU where everything works, but for some changes."
    facts = dict(
        python='3.12.3', has_nvidia=True, gpu='NVIDIA GeForce RTX 4090', driver='580.95.05', driver_cuda=13000, capability=(8, 9),
        versions=dict(torch='2.13.0', transformers='5.23.0', peft='0.21.2', bitsandbytes='0.50.2', triton='3.7.0'), torch_cuda='13.0',
        torch_archs=['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120', 'compute_120'], torch_sees_gpu=True,
        attention=['sdpa', 'flash (in PyTorch)', 'variable length'], compiler='/usr/bin/gcc', gpu_free=23 * GiB, gpu_total=24 * GiB,
        ram_total=64 * GiB, ram_free=50 * GiB, runs_free=300 * GiB, cache_dir='~/.cache/huggingface/hub', cache_free=300 * GiB)
    return Facts(**facts | changes)


NO_GPU = dict(gpu=None, driver=None, driver_cuda=None, capability=None, torch_sees_gpu=False, gpu_free=None, gpu_total=None, attention=['sdpa'])
FAULTS = {      # changes -> the check, its state, words of what it says, words of the cure
    'healthy': ({}, None, '', '', ''),
    'no GPU': (NO_GPU | dict(has_nvidia=False, torch_cuda=None), 'GPU', 'note', 'training runs on the CPU', ''),
    'no driver': (NO_GPU, 'GPU', 'broken', 'no driver answers', 'ubuntu-drivers install'),
    'no driver in WSL': (NO_GPU | dict(wsl=True), 'GPU', 'broken', 'WSL does not see', 'wsl --shutdown'),
    'PyTorch for the CPU': (dict(torch_cuda=None, torch_sees_gpu=False), 'PyTorch', 'broken', 'build for the CPU', 'download.pytorch.org/whl/cu'),
    'PyTorch broken': (dict(torch_error='ImportError: libcudnn.so.9', torch_sees_gpu=False), 'PyTorch', 'broken', 'libcudnn', 'pip install'),
    'driver too old': (dict(driver='535.10', driver_cuda=12020, torch_sees_gpu=False), 'PyTorch', 'broken', 'driver 535.10 is too old', 'cu126'),
    'GPU hidden': (dict(torch_sees_gpu=False), 'PyTorch', 'broken', 'does not see the GPU', 'unset CUDA_VISIBLE_DEVICES'),
    'GPU too new': (dict(gpu='RTX 5090', capability=(12, 0), torch_archs=['sm_80', 'sm_90']), 'PyTorch', 'broken', 'no kernels for sm_120', 'cu130'),
    'GPU too old': (dict(gpu='GTX 1080', capability=(6, 1)), 'PyTorch', 'broken', 'no kernels for sm_61', 'cu126'),
    'package outside': (dict(outside={'peft>=0.21': '0.17'}), 'packages', 'broken', '0.17 is installed', 'pip install "peft>=0.21"'),
    'torchvision': (dict(versions=dict(torch='2.13.0', torchvision='0.20', bitsandbytes='1', triton='3'), torchvision_error='RuntimeError: operator torchvision::nms'),
                    'torchvision', 'broken', 'does not match torch 2.13.0', 'pip uninstall -y torchvision'),
    'bitsandbytes broken': (dict(bitsandbytes_error='RuntimeError: no CUDA library'), 'bitsandbytes', 'broken', 'no CUDA library', 'python -m bitsandbytes'),
    'bitsandbytes missing': (dict(versions=dict(torch='2.13.0', triton='3')), 'bitsandbytes', 'note', 'no qlora', 'pip install bitsandbytes'),
    'old attention': (dict(capability=(7, 5), attention=['sdpa']), 'attention', 'note', 'sdpa', ''),
    'no compiler': (dict(compiler=None), 'torch.compile', 'broken', 'a C compiler', 'apt install build-essential'),
    'no headers': (dict(headers=False), 'torch.compile', 'broken', 'Python.h', 'python3-dev'),
    'no Triton': (dict(versions=dict(torch='2.13.0', bitsandbytes='1')), 'torch.compile', 'broken', 'triton', 'pip install triton'),
    'GPU full': (dict(gpu_free=2 * GiB, gpu_processes=[Process(4711, 'python', 21 * GiB)]), 'GPU memory', 'note', '21.00 GiB, python', 'kill 4711'),
    'little RAM': (dict(ram_free=GiB), 'CPU RAM', 'note', '1.00 GiB free', 'close other programs'),
    'full disk': (dict(cache_free=GiB // 2), 'disk', 'broken', '0.50 GiB', 'hf cache'),
    'small disk': (dict(runs_free=5 * GiB), 'disk', 'note', '5.00 GiB', 'merged'),
    'WSL': (dict(wsl=True), 'system', 'note', 'under WSL', '.wslconfig'),
    'macOS': (dict(system='Darwin'), 'system', 'note', 'Linux only', ''),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_fault(fault):
    changes, name, state, said, cure = FAULTS[fault]
    diagnosis = diagnose(machine(**changes))
    worse = {check.name: check for check in diagnosis.checks if check.state != 'fine'}
    expected = {name, 'system'} if 'wsl' in changes else {name} - {None}      # WSL is itself worth a note
    assert set(worse) == expected
    if name:
        assert worse[name].state == state and said in worse[name].found and cure in worse[name].cure
        assert bool(diagnosis.broken) == (state == 'broken')
        assert state != 'broken' or worse[name].cure
    text = str(diagnosis)
    assert text.startswith('Not ready: ' + (name or '') if diagnosis.broken else 'Ready: training runs on the ')
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_this_machine_has_what_the_package_asks_for():
    facts = collect_facts('nowhere/runs')
    assert facts.outside == {} and facts.torch_error is None and facts.bitsandbytes_error is None and facts.ram_total > 0


def test_nothing_but_the_diagnosis_is_printed():
    "In a process of its own: a library's first import logs once."
    pytest.importorskip('bitsandbytes')
    command = [sys.executable, '-c', 'from homelab_ft.hardware.doctor import look_at_torch, Facts; f = Facts(); look_at_torch(f); print(f.bitsandbytes_error)']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == 'None\n' and done.stderr == ''
