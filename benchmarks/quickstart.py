"""The quickstart with several seeds, as a user runs it: `python -m benchmarks.quickstart [--seeds 0 1 2] [--threads 2] [-o KEY=VALUE ...]`.

Each run is the whole command in a process and a folder of its own, so that nothing is rendered or asked before. Prints a table of the
means and of the lowest and highest, and writes it with the machine into `runs/seeds/quickstart.json`. Copied to
`benchmarks/results/quickstart.json`, these are the figures of README's table and picture."""
import argparse, json, os, platform, shutil, statistics, subprocess, sys, time
from importlib.metadata import version
from pathlib import Path

NETS = 'Teacher', 'Student', 'Twin'
SETS = {'held out': 'held_out', 'unseen font': 'unseen_font'} # As the table calls them, and the configuration


def machine():
    "What the figures were measured on"
    cpu = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), cpu)
    return dict(cpu=cpu, cores=os.cpu_count(), python=platform.python_version(), **{p: version(p) for p in ('torch', 'fastai', 'distillbook')})


def one_run(seed, out, threads, overrides=()):
    "The command for one seed; its figures, and the parameters of its networks"
    folder = out/f'seed{seed}'
    shutil.rmtree(folder, ignore_errors=True)
    own = [f'Global.seed={seed}', f'Global.save_model_dir={folder}', f'Global.threads={threads}']
    cmd = ['distillbook', 'train', '-c', 'configs/quickstart.yml']
    for o in [*own, *overrides]: cmd += ['-o', o]
    start = time.perf_counter()
    subprocess.run(cmd, check=True)
    took = time.perf_counter()-start
    nets = json.loads((folder/'summary.json').read_text())['networks']
    figures = {f'{net.lower()}, {name}': nets[net][key]['acc'] for name,key in SETS.items() for net in NETS}
    figures |= {f'student above its twin, {name}': figures[f'student, {name}']-figures[f'twin, {name}'] for name in SETS}
    figures |= {f'{net.lower()}, ms an image': nets[net]['ms_per_image'] for net in NETS}
    figures['teacher ms / student ms'] = nets['Teacher']['ms_per_image']/nets['Student']['ms_per_image']
    return figures | {'seconds, the whole command': took}, {net.lower(): nets[net]['parameters'] for net in NETS}


def spread(values): return dict(mean=round(statistics.mean(values), 4), lowest=round(min(values), 4), highest=round(max(values), 4))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('-o', nargs='+', default=[], metavar='KEY=VALUE', help='for the command, for instance fewer words to try this')
    p.add_argument('--out', type=Path, default=Path('runs/seeds'))
    a = p.parse_args()
    runs,parameters = zip(*(one_run(s, a.out, a.threads, a.o) for s in a.seeds))
    table = {k: spread([r[k] for r in runs]) for k in runs[0]}
    command = ' '.join(['python -m benchmarks.quickstart', *sys.argv[1:]])
    result = dict(command=command, seeds=a.seeds, threads=a.threads, machine=machine(), parameters=parameters[0], table=table)
    (a.out/'quickstart.json').write_text(json.dumps(result, indent=1))
    for k,v in table.items(): print(f"{k:36} {v['mean']:8.3f}   {v['lowest']:8.3f} .. {v['highest']:.3f}")


if __name__ == '__main__': main()
