"All tests: no network, no windows, the tools importable."
import os, sys
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tools'))
