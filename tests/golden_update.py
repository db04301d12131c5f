"""Make the files in tests/golden/ anew: python tests/golden_update.py [NAME ...]

Look at the difference before you commit it: what stands there is what people read."""
import sys, tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from golden_cases import CASES, GOLDEN, run_all, typed      # noqa: E402

if __name__ == '__main__':
    GOLDEN.mkdir(exist_ok=True)
    if not sys.argv[1:]:
        for file in GOLDEN.glob('*.txt'): file.unlink()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in run_all(folder, sys.argv[1:] or None):
            (GOLDEN / f'{name}.txt').write_text(f'{typed(CASES[name])}\n{text}', encoding='utf-8')
            print(name, file=sys.stderr)
