"""Ten thousand hostile inputs: `python tools/fuzz.py --n 10000 --seed 1`. Each ends in a result or in one line; anything else is told, with how to repeat it, and the status is 1.

The kinds of input are those of tests/hostile.py, all in turn. `--kind NAME --seed N` repeats one of them."""
import json, logging, os, random, sys, tempfile, time, warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]

from fastcore.script import call_parse

@call_parse
def main(
    n:int=10000, # Inputs
    seed:int=0, # Of the first; each has one of its own
    kind:str=None, # Only this one
    minutes:float=None, # Stop after so many
    out:str=None, # A file for what was found, JSON
):
    "Try hostile inputs"
    warnings.simplefilter('ignore')
    import hostile
    from benchmarks.quickstart import machine
    begun,faults = time.time(),[]
    end = time.time()+60*minutes if minutes else None
    kinds,done,bad = [kind] if kind else list(hostile.KINDS),Counter(),Counter()
    with tempfile.TemporaryDirectory() as d:
        sound = hostile.Sound(d)
        logging.disable(logging.CRITICAL) # Also where a command has set up the log
        os.chdir(d)
        for i in range(n):
            if end and time.time()>end: break
            name = kinds[i%len(kinds)]
            done[name] += 1
            if why := hostile.attempt(name, random.Random(seed+i), sound):
                bad[name] += 1
                faults.append(f'--kind {name} --seed {seed+i} --n 1: {why}')
                print(f'--kind {name} --seed {seed+i} --n 1: {why}', flush=True)
        os.chdir('/')
    for name in kinds: print(f'{name:20} {done[name]:6} tried  {bad[name]:4} other than a result or one line')
    print(f'{done.total()} inputs, {bad.total()} other than a result or one line')
    res = dict(command=' '.join(['python tools/fuzz.py', *sys.argv[1:]]), machine=machine(), seconds=round(time.time()-begun), inputs=done.total(), tried=dict(done), faults=faults)
    if out: (ROOT/out).write_text(json.dumps(res, indent=1)+'\n')
    sys.exit(bool(bad))
