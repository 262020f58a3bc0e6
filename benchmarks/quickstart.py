"""The quickstart with several seeds, as a user runs it: `python -m benchmarks.quickstart [--seeds 0 1 2] [--threads 2]`.

Each run is the whole command in a process and a folder of its own, so that nothing is rendered or asked before. Prints a table of the
means and of the lowest and highest, and writes it with the machine into `runs/seeds/quickstart.json`."""
import argparse, json, os, platform, shutil, statistics, subprocess, sys, time
from importlib.metadata import version
from pathlib import Path

FIGURES = {'student, held out': ('Student', 'heldout', 'exact'), 'student, unseen font': ('Student', 'unseen_font', 'exact'), 'twin, held out': ('Twin', 'heldout', 'exact'),
           'twin, unseen font': ('Twin', 'unseen_font', 'exact'), 'teacher, held out': ('Teacher', 'heldout', 'exact'), 'teacher, unseen font': ('Teacher', 'unseen_font', 'exact')}


def machine():
    "What the figures were measured on"
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if os.path.exists('/proc/cpuinfo') else platform.processor()
    return dict(cpu=cpu, cores=os.cpu_count(), python=platform.python_version(), **{p: version(p) for p in ('torch', 'fastai', 'distillbook')})


def one_run(seed, out, threads):
    "The command for one seed; its summary with what was asked of it"
    folder = out/f'seed{seed}'
    shutil.rmtree(folder, ignore_errors=True)
    cmd = ['distillbook', 'train', '-c', 'configs/quickstart.yml', '-o', f'Global.seed={seed}', f'Global.save_model_dir={folder}', f'Global.threads={threads}']
    start = time.perf_counter()
    subprocess.run(cmd, check=True)
    s = json.loads((folder/'summary.json').read_text())
    figures = {k: s[net][where][what] for k,(net,where,what) in FIGURES.items()}
    figures['student above its twin, held out'] = figures['student, held out'] - figures['twin, held out']
    figures['student above its twin, unseen font'] = figures['student, unseen font'] - figures['twin, unseen font']
    figures['teacher ms / student ms'] = s['Teacher']['ms_per_image']/s['Student']['ms_per_image']
    return figures | {'seconds, the whole command': time.perf_counter()-start}


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--out', type=Path, default=Path('runs/seeds'))
    a = p.parse_args()
    runs = [one_run(s, a.out, a.threads) for s in a.seeds]
    table = {k: dict(mean=round(statistics.mean(v), 4), lowest=round(min(v), 4), highest=round(max(v), 4)) for k in runs[0] for v in [[r[k] for r in runs]]}
    (a.out/'quickstart.json').write_text(json.dumps(dict(command=' '.join(['python -m benchmarks.quickstart', *sys.argv[1:]]), seeds=a.seeds, threads=a.threads, machine=machine(), table=table), indent=1))
    for k,v in table.items(): print(f"{k:36} {v['mean']:8.3f}   {v['lowest']:8.3f} .. {v['highest']:.3f}")


if __name__ == '__main__': main()
