"""The models of the coverage benchmark, with a small instance and inputs of each.

`specs()` lists them; `build(spec)` gives a model with random weights and the keyword arguments of one call. Models of
timm are its smallest variants with the smallest images that they take; those of transformers are made tiny (see
tiny_transformers.py). A model that cannot be built raises an error, and the benchmark counts it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import tiny_transformers
import torch
from tiny_transformers import Inputs
from torch import nn

TIMM = """
beit_base_patch16_224 beitv2_base_patch16_224 botnet26t_256 eca_resnext26ts gcresnet33ts gcresnext26ts gernet_s
haloregnetz_b lambda_resnet26t mobileone_s1 mobilevit_xxs mobilevitv2_050 regnetz_b16 repvgg_a0 resnet32ts resnext26ts
sebotnet33ts_256 seresnet33ts seresnext26ts test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
convnext_zepto_rms convnextv2_atto test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s
cs3se_edgenet_x cs3sedarknet_xdw cspdarknet53 cspresnet50 cspresnext50 darknet17 darknetaa53 sedarknet21 cspnext_tiny
davit_tiny deit_tiny_distilled_patch16_224 densenet121 densenetblur121d dla46x_c dpn48b edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientnetv2_rw_t fbnetc_100 gc_efficientnetv2_rw_t
mixnet_s mnasnet_small mobilenet_edgetpu_100 mobilenetv2_035 semnasnet_050 spnasnet_100 test_efficientnet
tf_efficientnet_lite0 tf_efficientnetv2_b0 tf_mixnet_s tinynet_e efficientvim_m1 efficientvit_b0 efficientvit_m0
eva02_tiny_patch14_224 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
ghostnet_050 ghostnetv3_050 hgnet_tiny hgnetv2_b0 hiera_tiny_224 hieradet_small sam2_hiera_tiny hrnet_w18_small
iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0
mambaout_femto test_mambaout coatnet_pico_rw_224 coatnext_nano_rw_224 maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256
maxxvitv2_nano_rw_256 test_coatnet test_maxvit caformer_s18 convformer_s18 poolformer_s12 poolformerv2_s12
gmixer_12_224 gmlp_ti16_224 mixer_s16_224 resmlp_12_224 fbnetv3_b hardcorenas_b lcnet_035 mobilenetv3_small_050
tf_mobilenetv3_small_075 mobilenetv5_base mvitv2_tiny naflexvit_base_patch16_parfac_gap nest_tiny nextvit_small
dm_nfnet_f0 eca_nfnet_l0 nf_regnet_b0 nfnet_l0 test_nfnet pit_ti_224 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetv_040
regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvit_m1 ecaresnet26t ecaresnetlight ecaresnext26t_32x4d
res2next50 resnest14d resnet10t resnetaa34d resnetblur18 resnetrs50 resnext50_32x4d seresnet18 seresnetaa50d
seresnext26t_32x4d skresnet18 skresnext50_32x4d test_resnet resnetv2_18 rexnet_100 rexnetr_100 selecsls42
legacy_seresnet18 sequencer2d_s shvit_s1 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny beit3_base_patch16_224
deit_tiny_patch16_224 flexivit_small test_vit vit_tiny_patch16_224 vitamin_small_224 test_vit_relpos
vit_srelpos_small_patch16_224 samvit_base_patch16_224 volo_d1_224 eca_vovnet39b ese_vovnet19b_slim_dw vovnet39a
legacy_xception xception41p xcit_nano_12_p8_224 resnetv2_50d_evos regnetz_c16_evos regnetz_d8_evos resnetv2_50d_frn
resnetv2_50d_gn swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 maxvit_rmlp_pico_rw_256 coatnet_rmlp_nano_rw_224
efficientnet_b0 tf_efficientnet_b0 efficientnet_es mobilenetv4_conv_small mobilenetv4_hybrid_medium
tf_mobilenetv3_small_minimal_100 mobilenetv3_rw ghostnet_100 ghostnetv2_100 dla60x_c res2net50_26w_4s
vit_relpos_small_patch16_224 levit_conv_128s crossvit_9_dagger_240 coat_lite_tiny twins_pcpvt_small nf_resnet26
nf_ecaresnet26 nf_seresnet26 pvt_v2_b2_li resnet18 resnet50 hrnet_w18_small_v2 eva02_small_patch14_224
vit_small_patch16_rope_224 deit3_small_patch16_224 gmixer_24_224 xcit_tiny_12_p16_224 dpn68 hardcorenas_a resnest26d
seresnet50 skresnet34 repvit_m0_9 mobilenetv1_100 efficientnet_cc_b0_4e lambda_resnet26rpt_256 vit_tiny_r_s16_p8_224
convnext_atto_ols convnext_atto_rms tiny_vit_11m_224 edgenext_x_small vit_wee_patch16_reg1_gap_256
vit_base_patch16_siglip_224 ese_vovnet19b_dw
"""
# Models of timm whose smallest variant is large; they are built with two blocks.
SHALLOW = set(
    "beit_base_patch16_224 beitv2_base_patch16_224 beit3_base_patch16_224 naflexvit_base_patch16_parfac_gap "
    "qwen3_vit_88m samvit_base_patch16_224 vit_base_patch16_siglip_224".split()
)

# For each model type of transformers: its base model, and the first two heads that it has for these tasks. dinat is not
# among the types: it needs natten, a compiled library that the extra `bench` does not have.
TASKS = (
    "MASKED_LM SEQUENCE_CLASSIFICATION CAUSAL_LM IMAGE_CLASSIFICATION SEQ_TO_SEQ_CAUSAL_LM AUDIO_CLASSIFICATION CTC "
    "OBJECT_DETECTION SEMANTIC_SEGMENTATION UNIVERSAL_SEGMENTATION DEPTH_ESTIMATION VIDEO_CLASSIFICATION BACKBONE "
    "TIME_SERIES_PREDICTION SPEECH_SEQ_2_SEQ IMAGE_TEXT_TO_TEXT KEYPOINT_DETECTION IMAGE_MATTING"
).split()
TRANSFORMERS = """
albert align aimv2 altclip apertus arcee audio-spectrogram-transformer autoformer bamba bart beit bert bert-generation
big_bird bigbird_pegasus biogpt bit bitnet blenderbot blenderbot-small blip bloom bridgetower bros camembert canine
chinese_clip clap clip clipseg codegen cohere cohere2 conditional_detr convbert convnext convnextv2 cpmant ctrl cvt
data2vec-audio data2vec-text data2vec-vision dbrx deberta deberta-v2 decision_transformer deepseek_v2 deepseek_v3
deformable_detr deit depth_anything detr diffllama dinov2 dinov2_with_registers dinov3_convnext dinov3_vit
distilbert doge donut-swin dots1 dpr dpt efficientnet electra encodec ernie ernie4_5 ernie4_5_moe esm eurobert exaone4
falcon falcon_h1 falcon_mamba fastspeech2_conformer flaubert flava fnet focalnet fsmt funnel gemma gemma2 gemma3_text
gemma3n_text git glm glm4 glm4_moe glpn gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite
granitemoe granitemoehybrid granitemoeshared groupvit helium hgnet_v2 hiera hubert hunyuan_v1_dense hunyuan_v1_moe
ibert ijepa imagegpt informer inkling_text jamba jetmoe kimi_linear layoutlm layoutlmv3 led levit lfm2 lfm2_moe lilt
llama llama4_text longformer longt5 luke lxmert m2m_100 mamba mamba2 marian markuplm mask2former maskformer-swin mbart
megatron-bert mgp-str mimi minimax ministral mistral mixtral mobilebert mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2
modernbert modernbert-decoder moonshine mpnet mpt mra mt5 musicgen mvp nemotron nemotron_h nllb-moe nystromformer olmo
olmo2 olmo3 olmo_hybrid olmoe oneformer openai-gpt opt owlv2 owlvit patchtsmixer patchtst pegasus pegasus_x perceiver
persimmon phi phi3 phimoe pix2struct plbart poolformer pop2piano prophetnet pvt pvt_v2 qwen2 qwen2_moe qwen3 qwen3_moe
qwen3_next recurrent_gemma reformer regnet rembert resnet roberta roberta-prelayernorm roc_bert roformer rt_detr
rt_detr_resnet rwkv sam seamless_m4t seed_oss segformer seggpt sew sew-d siglip smollm3 speech_to_text speecht5
splinter squeezebert stablelm starcoder2 superpoint swiftformer swin swin2sr swinv2 switch_transformers t5 t5gemma
table-transformer tapas textnet time_series_transformer timesfm timesformer trocr tvp udop umt5 unispeech unispeech-sat
univnet upernet vaultgemma videomae vilt visual_bert vit vit_mae vit_msn vitdet vitmatte vitpose_backbone vits vivit
wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm whisper xclip xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod yolos
yoso youtu zamba zamba2 bailing_hybrid dac sapiens2
"""


@dataclass(frozen=True)
class Spec:
    """One model: its library, and its name there (for transformers, "type/class")."""

    library: str
    name: str

    @property
    def group(self) -> str:
        """Models of a group share the modules that they import."""
        return self.name.split("/")[0]


def specs() -> list[Spec]:
    """Models of timm, then base models of transformers, then its heads, so that new architectures come first."""
    from transformers.models.auto import modeling_auto

    bases, heads = [], []
    for kind in TRANSFORMERS.split():
        classes: dict[str, None] = {}
        for task in ("", *(f"FOR_{task}_" for task in TASKS)):
            names = getattr(modeling_auto, f"MODEL_{task}MAPPING_NAMES").get(kind, ())
            classes |= dict.fromkeys([names] if isinstance(names, str) else names[:1])
        found = [Spec("transformers", f"{kind}/{name}") for name in classes][:3]
        bases += found[:1]
        heads += found[1:]
    return [Spec("timm", name) for name in TIMM.split()] + bases + heads


def build(spec: Spec) -> tuple[nn.Module, Inputs]:
    """The model in eval mode, with weights from seed 0, and keyword arguments for one call."""
    problems = []
    makers = _timm if spec.library == "timm" else tiny_transformers.models
    for make in makers(spec.name):
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = make().float()
                _enliven(model)
                candidates = _timm_inputs if spec.library == "timm" else tiny_transformers.candidate_inputs
                inputs = _accepted(model, candidates(model))
                _settle(model, inputs)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}".replace("\n", " ")[:300])
        else:
            return model, inputs
    raise RuntimeError(" | ".join(dict.fromkeys(problems)))


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    """Makes weights nonzero that start at or near zero: otherwise the output would not depend on parts of the model."""
    for name, parameter in model.named_parameters():
        if "bias" not in name and parameter.numel() and (parameter == parameter.flatten()[0]).all():
            if parameter.flatten()[0].abs() >= 0.01:
                continue
            if parameter.dim() < 2:
                parameter.fill_(0.5)
            else:
                parameter.normal_(0, 0.02)


def _settle(model: nn.Module, inputs: Inputs) -> None:
    """Gives batch norms the statistics of these inputs, so that they normalise in eval mode as after a training."""
    norms = [
        module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    try:
        with torch.no_grad():
            model.train()(**inputs)
    except Exception:  # the measurement finds and reports it
        pass
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def _accepted(model: nn.Module, candidates: Iterator[Inputs]) -> Inputs:
    """The first inputs with which the model runs; if there are none, raises the error of the likeliest ones."""
    problem: Exception | None = None
    for inputs in candidates:
        try:
            with torch.no_grad():
                model.eval()(**inputs)
                return inputs
        except Exception as error:
            problem = problem or error
    raise problem or ValueError(f"no inputs known for {type(model).__name__}")


def _timm(name: str) -> Iterator[Callable[[], nn.Module]]:
    import timm

    depth = {"depth": 2} if name in SHALLOW else {}
    yield lambda: timm.create_model(name, img_size=64, num_classes=10, **depth)
    yield lambda: timm.create_model(name, num_classes=10, **depth)


def _timm_inputs(model: nn.Module) -> Iterator[Inputs]:
    channels, size, _ = model.default_cfg.get("input_size", (3, 224, 224))
    for smaller in (64, 96, 128, 160, 192, 224, size):
        yield {"x": torch.randn(2, channels, smaller, smaller, generator=torch.Generator().manual_seed(0))}
