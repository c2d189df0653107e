# SPDX-License-Identifier: Apache-2.0
"""Which module of PEFT has which public names, and which of ours gives them.

A name is looked up in ``HOMES``, then among fastadapt's own public names, then as a layer or model
class of a method (``virtual``). A name that has no behaviour yet exists and raises UnsupportedError
when it is used.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

_C = "fastadapt.compat."

HOMES = {
    _C + "adapters": (
        "inject_adapter_in_model get_peft_model_state_dict set_peft_model_state_dict "
        "get_base_model_state_dict set_base_model_state_dict load_peft_weights set_adapter "
        "delete_adapter set_requires_grad cast_adapter_dtype cast_mixed_precision_params "
        "inspect_matched_modules check_target_module_exists _get_submodules _set_adapter "
        "infer_device transpose shift_tokens_right id_tensor_storage _freeze_adapter "
        "get_peft_config get_pattern_key str_to_bool match_target_against_key"
    ),
    _C + "keys": (
        "_find_minimal_target_modules _maybe_include_all_linear_layers "
        "_get_tuner_state_dict_key_prefixes _filter_state_dict_by_key_prefixes"
    ),
    _C + "status": "get_layer_status get_model_status TunerLayerStatus TunerModelStatus",
    _C + "helpers": (
        "MontecloraTrainerMixin MontecloraSampler check_if_peft_model rescale_adapter_scale "
        "disable_input_dtype_casting DoraCaching "
        "update_forward_signature update_generate_signature update_signature"
    ),
    "fastadapt.constants": "BufferDict",
    _C + "conversion": "convert_to_lora save_as_lora",
    _C + "register": "register_peft_method",
    _C + "kappa": "KappaTuneSelector find_kappa_target_modules",
    _C + "alora": (
        "calculate_alora_offsets get_alora_offsets_for_forward get_alora_offsets_for_generate "
        "is_alora_relevant_in_batch"
    ),
    _C + "tied": "_get_module_names_tied_with_embedding _get_no_split_modules",
    _C + "hotswap": (
        "hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap "
        "check_hotswap_configs_compatible"
    ),
    _C + "auto": (
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForSeq2SeqLM "
        "AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification "
        "AutoPeftModelForQuestionAnswering AutoPeftModelForFeatureExtraction"
    ),
    _C + "mixed": "PeftMixedModel MixedModel COMPATIBLE_TUNER_TYPES",
    _C + "virtual": (
        "BaseTuner BaseTunerLayer AuxiliaryTrainingWrapper TrainableTokensWrapper "
        "QuantizationBackend Bnb4bitBackend Bnb8bitBackend"
    ),
    _C + "constants": (
        "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING "
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING WEIGHTS_NAME "
        "SAFETENSORS_WEIGHTS_NAME CONFIG_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND "
        "EMBEDDING_LAYER_NAMES SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME DUMMY_TARGET_MODULES "
        "DUMMY_MODEL_CONFIG MIN_TARGET_MODULES_FOR_OPTIMIZATION ALLOWED_COMPUTE_DTYPES "
        "UPCAST_DTYPES is_bnb_available is_bnb_4bit_available is_gptqmodel_available "
        "is_optimum_available is_torch_tpu_available is_aqlm_available is_eetq_available "
        "is_hqq_available is_inc_available is_torchao_available is_xpu_available "
        "is_diffusers_available is_te_available is_transformers_ge_v5 is_transformers_ge_v5_1_0 "
        "is_transformers_ge_v5_6_0 is_transformers_ge_v5_4_0 is_diffusers_ge_v040 "
        "is_torchao_ge_v0_18_0"
    ),
    "fastadapt.modules_to_save": "ModulesToSaveWrapper",
    "fastadapt.errors": "PeftError NoMatchingPeftModuleError PeftWarning",
    "fastadapt.config": "PeftConfigMixin",
}
_HOME = {name: module for module, names in HOMES.items() for name in names.split()}

# package of fastadapt.tuners: PEFT's type, stem of its Config and Model, its layer classes
TUNERS = {
    "lora": ("LORA", "Lora", "LoraLayer Linear Embedding Conv1d Conv2d Conv3d MultiheadAttention "
             "ParamWrapper Linear8bitLt Linear4bit GPTQLoraLinear AwqLoraLinear AqlmLoraLinear "
             "EetqLoraLinear HqqLoraLinear TorchaoLoraLinear LoraParallelLinear"),
    "adalora": ("ADALORA", "AdaLora", "AdaLoraLayer SVDLinear SVDConv2d SVDLinear8bitLt "
                "SVDLinear4bit RankAllocator"),
    "adamss": ("ADAMSS", "Adamss", "AdamssLayer Linear"),
    "adaption_prompt": ("ADAPTION_PROMPT", "AdaptionPrompt", "AdaptedAttention"),
    "beft": ("BEFT", "Beft", "BeftLayer Linear"),
    "boft": ("BOFT", "BOFT", "BOFTLayer Linear Conv2d"),
    "c3a": ("C3A", "C3A", "C3ALayer C3ALinear"),
    "cartridge": ("CARTRIDGE", "Cartridge", "CartridgeEncoder"),
    "cpt": ("CPT", "CPT", "CPTEmbedding"),
    "deft": ("DEFT", "Deft", "DeftLayer DeftLinear"),
    "delora": ("DELORA", "Delora", "DeloraLayer DeloraLinear"),
    "fourierft": ("FOURIERFT", "FourierFT", "FourierFTLayer FourierFTLinear"),
    "frod": ("FROD", "Frod", "FrodLayer Linear"),
    "glora": ("GLORA", "Glora", "GloraLayer GloraLinear"),
    "gralora": ("GRALORA", "Gralora", "GraloraLayer Linear"),
    "hira": ("HIRA", "Hira", "HiraLayer Linear Embedding Conv1d Conv2d Conv3d Linear8bitLt "
             "Linear4bit"),
    "hra": ("HRA", "HRA", "HRALayer HRALinear HRAConv2d"),
    "ia3": ("IA3", "IA3", "IA3Layer Linear Conv2d Conv3d Linear8bitLt Linear4bit"),
    "lily": ("LILY", "Lily", "LilyLayer Linear"),
    "ln_tuning": ("LN_TUNING", "LNTuning", "LNTuningLayer"),
    "loha": ("LOHA", "LoHa", "LoHaLayer Linear Conv1d Conv2d"),
    "lokr": ("LOKR", "LoKr", "LoKrLayer Linear Conv1d Conv2d"),
    "miss": ("MISS", "Miss", "MissLayer MissLinear"),
    "multitask_prompt_tuning": ("MULTITASK_PROMPT_TUNING", "MultitaskPromptTuning",
                                "MultitaskPromptEmbedding MultitaskPromptTuningInit"),
    "oft": ("OFT", "OFT", "OFTLayer Linear Conv2d Embedding"),
    "osf": ("OSF", "OSF", "OSFLayer Linear"),
    "p_tuning": ("P_TUNING", "PromptEncoder", "PromptEncoder PromptEncoderReparameterizationType"),
    "peanut": ("PEANUT", "Peanut", "PeanutLayer Linear"),
    "poly": ("POLY", "Poly", "PolyLayer Linear"),
    "prefix_tuning": ("PREFIX_TUNING", "PrefixTuning", "PrefixEncoder"),
    "prompt_tuning": ("PROMPT_TUNING", "PromptTuning", "PromptEmbedding PromptTuningInit"),
    "psoft": ("PSOFT", "Psoft", "PsoftLayer Linear"),
    "pvera": ("PVERA", "Pvera", "PveraLayer Linear Linear8bitLt Linear4bit"),
    "randlora": ("RANDLORA", "RandLora", "RandLoraLayer Linear Linear8bitLt Linear4bit"),
    "road": ("ROAD", "Road", "RoadLayer Linear Linear8bitLt Linear4bit"),
    "shadow": ("SHADOW", "Shadow", ""),
    "shira": ("SHIRA", "Shira", "ShiraLayer Linear"),
    "supertuning": ("SUPERTUNING", "Supertuning", "SupertuningLayer Linear"),
    "tinylora": ("TINYLORA", "TinyLora", "TinyLoraLayer Linear Embedding"),
    "trainable_tokens": ("TRAINABLE_TOKENS", "TrainableTokens", "TrainableTokensLayer"),
    "unilora": ("UNILORA", "UniLora", "UniLoraLayer Linear"),
    "vblora": ("VBLORA", "VBLoRA", "VBLoRALayer Linear"),
    "vera": ("VERA", "Vera", "VeraLayer Linear Linear8bitLt Linear4bit"),
    "waveft": ("WAVEFT", "WaveFT", "WaveFTLayer WaveFTLinear"),
    "xlora": ("XLORA", "XLora", "XLoraLayer"),
}  # fmt: skip

# names that belong to no method's Config, Model or layer, and have no behaviour yet
LATER = (
    "ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig CordaConfig "
    "MontecloraConfig VeloraConfig PromptLearningConfig "
    "bloom_model_postprocess_past_key_value "
    "compose_cartridge_adapters create_arrow_model "
    "get_eva_state_dict preprocess_loraga initialize_lora_eva_weights "
    "initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
    "prompt_embeddings_from_past_key_values replace_lora_weights_loftq "
    "starcoder_model_postprocess_past_key_value check_adapters_to_merge _get_batch_size "
    "_get_input_embeddings_name _is_valid_match _prepare_prompt_learning_config _set_trainable "
    "_get_no_split_modules _get_module_names_tied_with_embedding "
    "get_gptqmodel_quant_linear get_quantization_config "
    "get_quantization_kwargs map_cache_to_layer_device_map quantization_extra_repr "
    "resolve_quantization_backend set_additional_trainable_modules onload_layer clone_module "
    "replicate_layers find_parameter_name_by_module get_device_map BasePromptEncoder "
    "LycorisConfig LycorisLayer LycorisTuner LoraVariant DoraLinearLayer DoraEmbeddingLayer "
    "DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer DoraLinearVariant DoraEmbeddingVariant "
    "DoraConv1dVariant DoraConv2dVariant DoraConv3dVariant ALoraLinearVariant "
    "QALoraLinearVariant BlockDiagonalLinear "
    "dequantize_module_weight dequantize_bnb_weight gather_params_ctx get_layer_device_map "
    "init_empty_weights skip_init_on_device loftq_init reshape_weight_task_tensors "
    "magnitude_based_pruning random_pruning prune calculate_majority_sign_mask disjoint_merge "
    "task_arithmetic magnitude_prune ties dare_linear dare_ties check_file_exists_on_hf_hub "
    "fsdp_auto_wrap_policy torch_load has_valid_embedding_base_layer get_embedding_layer_name "
    "dispatch_default TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING ShadowLayer "
    "ShadowCache ShadowCarrier DetachedShadowModel BufferedMontecloraSampler "
    "ForwardOnlyQuantizationBackend "
    "TorchaoBackend HqqBackend IncrementalPCA KasaLinearVariant VeloraFunction preprocess_corda "
    "reduce_intruder_dimension _LoraFactorsProxy"
)
_LATER = frozenset(LATER.split())

# other modules of PEFT; their names are those of PEFT that any module gives
MODULES = (
    "functional helpers mapping mapping_func import_utils mixed_model auto tuners "
    "tuners.tuners_utils "
    "tuners.lycoris_utils tuners._buffer_dict tuners.mixed tuners.mixed.model utils "
    "utils.constants utils.error utils.hotswap utils.integrations utils.loftq_utils "
    "utils.merge_utils utils.other utils.peft_types utils.quantization_utils "
    "utils.save_and_load utils.warning tuners.lora.conversion tuners.lora.corda tuners.lora.dora "
    "tuners.lora.eva tuners.lora.variants tuners.lora.loraga tuners.lora.arrow tuners.lora.gptq "
    "tuners.lora.awq tuners.lora.aqlm tuners.lora.eetq tuners.lora.hqq tuners.lora.torchao "
    "tuners.lora.tp_layer tuners.lora.intruders tuners.lora.inc tuners.lora.monteclora "
    "tuners.lora.velora tuners.lora.te tuners.shira.mask_functions tuners.waveft.constants "
    "tuners.osf.utils tuners.shadow.layers tuners.shadow.diffusion_models utils.incremental_pca "
    "utils.transformers_weight_conversion"
)


ROOT = (
    "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
    "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM "
    "AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification ArrowConfig "
    "BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig MontecloraConfig VeloraConfig "
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING "
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING "
    "NoMatchingPeftModuleError PeftError PeftWarning PeftMixedModel PromptLearningConfig "
    "bloom_model_postprocess_past_key_value cast_mixed_precision_params "
    "compose_cartridge_adapters convert_to_lora create_arrow_model find_kappa_target_modules "
    "get_base_model_state_dict get_eva_state_dict get_layer_status get_model_status "
    "get_peft_config get_peft_model_state_dict initialize_kv_prefix_from_past_key_values "
    "initialize_kv_prefix_from_text initialize_lora_eva_weights inject_adapter_in_model "
    "load_peft_weights preprocess_loraga prompt_embeddings_from_past_key_values "
    "replace_lora_weights_loftq save_as_lora set_base_model_state_dict "
    "set_peft_model_state_dict shift_tokens_right"
)


def public() -> list[str]:
    """The names that PEFT has at its root."""
    found = set(ROOT.split())
    for peft_type, stem, classes in TUNERS.values():
        found.add(f"{stem}Config")
        found |= set(classes.split()) if peft_type in PROMPTS else {f"{stem}Model"}
    return sorted(found - {"MultitaskPromptEmbedding"})


PROMPTS = "CARTRIDGE CPT MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING PROMPT_TUNING".split()  # noqa: SIM905
_STEMS = {stem: package for package, (_, stem, _) in TUNERS.items()}


@cache
def find(name: str, package: str | None = None) -> Any:
    """The object that PEFT calls ``name``; package: of ``fastadapt.tuners``, whose layer classes
    have names that others have too. Raises AttributeError for a name that PEFT does not have."""
    from fastadapt.compat import virtual

    fastadapt: Any = sys.modules["fastadapt"]
    if package is not None and name in TUNERS[package][2].split():
        peft_type = TUNERS[package][0]
        if peft_type in PROMPTS or name.endswith(("Init", "Type", "Allocator")):
            return _own(name) or virtual.absent(name)
        return virtual.layer_class(name, peft_type, package)
    if name in _HOME:
        found = getattr(import_module(_HOME[name]), name, None)
        return virtual.absent(name) if found is None else found
    if name in fastadapt.own_names():
        return getattr(fastadapt, name)
    for stem, owner in _STEMS.items():
        if name == f"{stem}Model":
            return virtual.model_class(name, TUNERS[owner][0], owner)
        if name == f"{stem}Config":
            return virtual.absent(name, TUNERS[owner][0])
    for owner, (peft_type, _, layers) in TUNERS.items():
        if name in layers.split() and (name.endswith("Layer") or peft_type in PROMPTS):
            return find(name, owner)
    if name.startswith("TRANSFORMERS_MODELS_TO_"):
        return virtual.target_mapping(name) or virtual.absent(name)
    if name in _LATER:
        return virtual.absent(name)
    raise AttributeError(name)


def _own(name: str) -> Any:
    fastadapt: Any = sys.modules["fastadapt"]
    return getattr(fastadapt, name) if name in fastadapt.own_names() else None


class _Names(ModuleType):
    """A module of PEFT's path whose names are looked up when they are asked for."""

    package: str | None = None
    __path__: list[str] = []  # noqa: RUF012 - what makes it a package for the import system

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        child = sys.modules.get(f"{self.__name__}.{name}")
        if child is not None:
            return child
        try:
            return find(name, self.package)
        except AttributeError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None


def _is_file(path: str) -> bool:
    """A module of our own has this path; it is left alone."""
    where = Path(__file__).parent.parent.joinpath(*path.split("."))
    return where.with_suffix(".py").exists() or where.joinpath("__init__.py").exists()


def install() -> None:
    """Put PEFT's module paths under ``fastadapt``; a name is imported when it is asked for."""
    paths: list[tuple[str, str | None]] = [(m, None) for m in MODULES.split()]
    for owner in TUNERS:
        paths += [(f"tuners.{owner}{leaf}", owner)
                  for leaf in ("", ".layer", ".model", ".config", ".bnb")]  # fmt: skip
    for path, package in sorted(paths):
        if _is_file(path):
            continue
        name = f"fastadapt.{path}"
        module = _Names(name, f"PEFT's names of ``peft.{path}``.")
        if package is None and path.startswith("tuners.lora."):
            package = "lora"
        module.package = package
        sys.modules.setdefault(name, module)
        parent, _, leaf = name.rpartition(".")
        if leaf not in vars(sys.modules[parent]):
            setattr(sys.modules[parent], leaf, module)
