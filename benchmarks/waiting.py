"""How threads that wait should wait: a training step where the machine is quiet, and where other programs want its cores too.

    python -m benchmarks.waiting [--busy] [--steps 12] [--rounds 5] [--threads 2] [--note TEXT] [--json benchmarks/results/waiting.json]

A step is forward, CTC and backward of two `PlainStudent`s (128 pictures of 48 x 160) and an AdamW. OpenMP's threads wait for one another many times in it,
and the environment says how before torch is imported: they spin for as long as it takes (nothing set, the library's own choice), go to sleep at
once (`OMP_WAIT_POLICY=passive`), or spin for a bounded number of turns and then sleep (`GOMP_SPINCOUNT`, of GNU's library, which torch's Linux wheels
have). Each setting has a process of its own in each round, and which is first changes from round to round. Shown is the median of all steps, and its
ratio to the best setting under the same condition. Quiet is measured always, and with `--busy` so is the machine beside two processes that only count."""
import argparse, json, os, subprocess, sys
from pathlib import Path
from statistics import median

SETTINGS = {'unset': {}, 'passive': dict(OMP_WAIT_POLICY='passive'), **{f'spin {n}': dict(GOMP_SPINCOUNT=str(n)) for n in (1000,10000,20000,30000,100000)}}
BUSY = '''
import os
parent = os.getppid()
while os.getppid()==parent: # It ends when we do, however that happens
    for _ in range(10**6): pass
'''
OURS = ('OMP_WAIT_POLICY','GOMP_SPINCOUNT','OMP_NUM_THREADS')

def steps(n):
    "Seconds of each of `n` steps; the first three do not count"
    import time
    import torch
    from distillbook.core import keep_memory
    from distillbook.rec.losses import ctc_loss
    from distillbook.rec.nets import PlainStudent
    keep_memory()
    torch.manual_seed(0)
    nets = [PlainStudent(63).to(memory_format=torch.channels_last) for _ in range(2)]
    x = torch.randn(128, 3, 48, 160).to(memory_format=torch.channels_last)
    label,length = torch.randint(1, 63, (128,20)),torch.full((128,), 8)
    opt = torch.optim.AdamW([p for net in nets for p in net.parameters()], lr=1e-3, fused=True)
    took = []
    for _ in range(n+3):
        start = time.perf_counter()
        sum(ctc_loss(net(x), label, length) for net in nets).backward()
        opt.step()
        opt.zero_grad()
        took.append(time.perf_counter()-start)
    return took[3:]

def one_process(setting, threads, n):
    "The steps of a process with a setting"
    env = {k: v for k,v in os.environ.items() if k not in OURS} | SETTINGS[setting] | dict(OMP_NUM_THREADS=str(threads))
    cmd = [sys.executable, '-W', 'ignore', '-m', 'benchmarks.waiting', '--child', str(n)]
    return json.loads(subprocess.run(cmd, env=env, capture_output=True, text=True, check=True).stdout)

def measured(busy, a):
    "Steps of each setting, in turns; beside so many processes that only count"
    others = [subprocess.Popen([sys.executable, '-c', BUSY]) for _ in range(busy)]
    took = {k: [] for k in SETTINGS}
    try:
        for r in range(a.rounds):
            order = list(SETTINGS)[r%len(SETTINGS):] + list(SETTINGS)[:r%len(SETTINGS)]
            for k in order: took[k] += one_process(k, a.threads, a.steps)
    finally:
        for o in others: o.kill()
    return took

def rows(condition, took):
    best = min(median(v) for v in took.values())
    for k,v in took.items():
        ms = {name: round(1e3*f(v), 1) for name,f in (('ms',median), ('lowest',min), ('highest',max))}
        yield dict(condition=condition, setting=k, **ms, ratio=round(median(v)/best, 2))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--busy', action='store_true', help='beside two busy processes too')
    p.add_argument('--steps', type=int, default=12)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--note', help='what else the machine did, for instance "shared with other work"')
    p.add_argument('--json', type=Path)
    p.add_argument('--child', type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return print(json.dumps(steps(a.child)))
    from benchmarks.quickstart import machine
    from distillbook.core import write_beside
    about = dict(command=' '.join(['python -m benchmarks.waiting', *sys.argv[1:]]), machine=machine(), note=a.note, threads=a.threads,
        steps=a.steps, rounds=a.rounds, load_before=round(os.getloadavg()[0], 1), rows=[])
    for condition,busy in [('quiet',0), *([('beside two busy processes',2)] if a.busy else [])]:
        for row in rows(condition, measured(busy, a)):
            about['rows'].append(row)
            print(f"{condition:26} {row['setting']:12} {row['ms']:8.1f} ms ({row['lowest']:.1f} to {row['highest']:.1f})  {row['ratio']:.2f}", flush=True)
    if a.json:
        with write_beside(a.json) as tmp: tmp.write_text(json.dumps(about, indent=1))

if __name__=='__main__': main()
