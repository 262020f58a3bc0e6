"PP-OCRv6's recogniser, and PP-OCRv2's with enhanced CTC, trained from their configurations on a few lines"
import json, pickle
from pathlib import Path
import numpy as np, pytest, torch, yaml
from distillbook.config import build_loss, build_terms, experiment, load_config
from distillbook.core import UserError
from distillbook.rec.losses import CenterLoss
from distillbook.rec.operations import CTCLabelEncode
from distillbook.use.training import train
from test_v4_rec import words

CONFIGS = Path(__file__).parents[1]/'configs'/'rec'

def on_lines(words, out, which, more):
    o = ['Global.epoch_num=1', 'Global.use_gpu=false', f'Global.save_model_dir={out}', 'Global.character_dict_path=', 'Global.use_space_char=false', 'Global.pretrained_model=', *more]
    o += [f'{s}.{k}' for s in ('Train','Eval') for k in (f'dataset.data_dir={words}', f'dataset.label_file_list=[{words}/lines.txt]', 'loader.num_workers=0', 'loader.batch_size_per_card=4')]
    return load_config(which, o)

@pytest.mark.parametrize('size', ['tiny','small'])
def test_ppocrv6_recogniser_trained_for_an_epoch(size, words, tmp_path):
    "Lines of several heights, CTC with its light neck or its guide, NRTR beside it"
    ctc = dict(tiny='{Neck: {name: reshape}, Head: {mid_channels: 8, use_guide: true, fc_decay: 0.00001}}', small='{Neck: {name: lightsvtr, dims: 16, depth: 1, mlp_ratio: 2.0, local_kernel: 7}, Head: {fc_decay: 0.00001}}')[size]
    head = f'[CTCHead: {ctc}, NRTRHead: {{nrtr_dim: 32, num_decoder_layers: 1, max_text_length: 25}}]'
    cfg = on_lines(words, tmp_path/'run', CONFIGS/'ppocrv6.yml', ['Architecture.Backbone.model_size=tiny', f'Architecture.Head.head_list={head}', 'Train.sampler.first_bs=4', 'Global.cal_metric_during_train=true', f"Global.use_ema={size=='small'}"])
    learn = train(experiment(cfg))
    losses = torch.stack(list(learn.term_recorder.steps))
    assert [t.name for t in learn.term_recorder.terms.terms]==['CTCLoss','NRTRLoss'] and len(losses)>1 and losses.isfinite().all()
    networks = json.loads((tmp_path/'run/summary.json').read_text())['networks']
    assert list(networks)==(['Model','EMA'] if size=='small' else ['Model'])
    assert ('acc: ' in (tmp_path/'run/train.log').read_text()) and (size=='tiny' or 'Model_acc: ' in (tmp_path/'run/train.log').read_text())


# %% enhanced CTC
ENHANCED = '''
Global: {use_gpu: false, epoch_num: 1, save_model_dir: OUT, eval_batch_step: [0, 100], character_dict_path: , max_text_length: 25, cal_metric_during_train: true, seed: 3}
Optimizer: {name: Adam, lr: {name: Const, learning_rate: 0.001}, regularizer: {name: L2, factor: 2.0e-05}}
Architecture:
  model_type: rec
  algorithm: CRNN
  Backbone: {name: MobileNetV1Enhance, scale: 0.0625}
  Neck: {name: SequenceEncoder, encoder_type: rnn, hidden_size: 16}
  Head: {name: CTCHead, mid_channels: 12, fc_decay: 0.00002, return_feats: true}
Loss: {name: CombinedLoss, loss_config_list: [CTCLoss: {use_focal_loss: false, weight: 1.0}, CenterLoss: {weight: 0.05, num_classes: 37, feat_dim: 12, center_file_path: }]}
PostProcess: {name: CTCLabelDecode}
Metric: {name: RecMetric, main_indicator: acc}
Train:
  dataset: {name: SimpleDataSet, data_dir: WORDS, label_file_list: [WORDS/lines.txt], transforms: [DecodeImage: {img_mode: BGR}, CTCLabelEncode: , RecResizeImg: {image_shape: [3, 32, 96]}, KeepKeys: {keep_keys: [image, label, length, label_ace]}]}
  loader: {shuffle: true, batch_size_per_card: 4, drop_last: true, num_workers: 0}
Eval:
  dataset: {name: SimpleDataSet, data_dir: WORDS, label_file_list: [WORDS/lines.txt], transforms: [DecodeImage: {img_mode: BGR}, CTCLabelEncode: , RecResizeImg: {image_shape: [3, 32, 96]}, KeepKeys: {keep_keys: [image, label, length]}]}
  loader: {shuffle: false, batch_size_per_card: 4, drop_last: false, num_workers: 0}
'''

def enhanced(words, out, overrides=()):
    path = out/'enhanced.yml'
    path.write_text(ENHANCED.replace('WORDS', str(words)).replace('OUT', str(out/'run')))
    return load_config(path, list(overrides))

def test_enhanced_ctc_trained_for_an_epoch(words, tmp_path):
    "The file as PaddleOCR has it, label_ace that nobody reads included; the classes in the label are counted"
    exp = experiment(enhanced(words, tmp_path))
    assert [(t.name, t.addresses, t.weight) for t in exp.terms]==[('CTCLoss', ('Model.1',), 1.), ('loss_center', ('Model.0','Model.1'), .05)]
    x,label,length,ace = next(iter(exp.dls.train))
    for row,n,counts in zip(label, length, ace): assert counts.shape==(37,) and counts[0]==0 and counts.tolist()==np.bincount(row[:n], minlength=37).tolist()
    learn = train(exp)
    losses = torch.stack(list(learn.term_recorder.steps))
    assert losses.isfinite().all() and (losses>0).all()

def test_centre_loss_is_paddles():
    "Squares of all distances, those of other classes masked, clipped, summed, over the frames"
    torch.manual_seed(0)
    features,logits = torch.randn(3, 7, 6, requires_grad=True),torch.randn(3, 7, 11)
    loss = CenterLoss(11, 6)
    got = loss(features, logits)
    f,c = features.detach().double().reshape(-1, 6),loss.centres.double()
    away = (f.square().sum(1, keepdim=True) + c.square().sum(1) - 2*f@c.T)
    want = (away*nn_mask(logits)).clamp(1e-12, 1e12).sum()/len(f)
    assert got.item()==pytest.approx(want.item(), rel=1e-5)
    assert torch.equal(CenterLoss(11, 6).centres, loss.centres) # A run that goes on has the same

def nn_mask(logits): return torch.nn.functional.one_hot(logits.argmax(-1).flatten(), logits.shape[-1]).double()

def test_centres_from_a_file(words, tmp_path):
    "PaddleOCR's pickle, read as data; whatever else is in a file is refused"
    file = tmp_path/'centres.pkl'
    file.write_bytes(pickle.dumps({3: np.full(12, 2., np.float32), 5: np.zeros(12, np.float32)}, 2))
    o = [f'Loss.loss_config_list=[CTCLoss: {{weight: 1.0}}, CenterLoss: {{weight: 0.1, num_classes: 37, feat_dim: 12, center_file_path: {file}}}]']
    loss = build_terms(enhanced(words, tmp_path, o))[1].fn
    assert loss.centres[3].tolist()==[2.]*12 and loss.centres[5].abs().sum()==0 and loss.centres[4].abs().sum()>0
    file.write_bytes(pickle.dumps({3: print}, 2))
    with pytest.raises(UserError, match='centres.pkl: not a plain file'): build_terms(enhanced(words, tmp_path, o))

@pytest.mark.parametrize('override,says', [('Architecture.Head.return_feats=false', 'return_feats: true'), ('Loss.loss_config_list=[CentreLoss: {weight: 1.0}]', "did you mean 'CenterLoss'"),
    ('Loss.loss_config_list=[CTCLoss: {}]', 'weight is wanted')], ids=['no features','a name','no weight'])
def test_what_is_refused(override, says, words, tmp_path):
    with pytest.raises(UserError, match=says): build_terms(enhanced(words, tmp_path, [override]))

def test_not_for_networks_with_names():
    net = dict(Backbone=dict(name='PlainBackbone'), Head=dict(name='CTCHead'))
    cfg = dict(Global={}, Architecture=dict(model_type='rec', Models=dict(A=net, B=net)), Loss=dict(name='CombinedLoss', loss_config_list=[dict(CTCLoss=dict(weight=1.))]))
    with pytest.raises(UserError, match='CTCLoss is for one network without a name; for A, B'): build_loss(cfg)

def test_counts_only_where_they_are_kept():
    encode = CTCLabelEncode(25)
    assert set(encode.encode('ab'))=={'label','length'}
    encode.counts = True
    assert encode.encode('aab')['label_ace'].sum()==3
