"""Where the time goes, as tables and JSON.

    python -m benchmarks [SUITE...] [--threads 2] [--rounds 7] [--compile] [--json FILE]
"""
import argparse, json, os, sys
from pathlib import Path

def main():
    ap = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('suites', nargs='*', help='Default: all')
    ap.add_argument('--threads', type=int, default=2)
    ap.add_argument('--rounds', type=int, default=7)
    ap.add_argument('--compile', action='store_true', help='Try torch.compile too (minutes, and a C++ compiler)')
    ap.add_argument('--json', type=Path)
    a = ap.parse_args()
    os.environ['OMP_NUM_THREADS'] = str(a.threads)
    import cv2, torch, warnings
    import pandas as pd
    from benchmarks.quickstart import machine
    from benchmarks.speed import SUITES
    from distillbook.core import write_beside
    warnings.simplefilter('ignore')
    torch.set_num_threads(a.threads)
    cv2.setNumThreads(a.threads)
    if bad := [s for s in a.suites if s not in SUITES]: ap.error(f"no suite {bad[0]!r}; there are {', '.join(SUITES)}")
    found = dict(machine=machine(), torch=torch.__version__, threads=a.threads, rounds=a.rounds, command=' '.join(['python -m benchmarks', *sys.argv[1:]]))
    print(', '.join(f'{k}: {v}' for k,v in found.items()))
    for name in a.suites or SUITES:
        rows = found[name] = list(SUITES[name](rounds=a.rounds, compile=a.compile))
        print(f'\n{name}: {SUITES[name].__doc__}\n{pd.DataFrame(rows).to_string(index=False, na_rep="")}', flush=True)
        if a.json:
            with write_beside(a.json) as tmp: tmp.write_text(json.dumps(found, indent=1))

if __name__=='__main__': main()
