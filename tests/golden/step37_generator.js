// The data and the function of the command generator for Step-3.7-Flash (Step37FlashDeployment), as the report on
// SGLang PR 26565 quotes them, without the React part. Two things are not as in the report: its page swallowed a
// backslash of each '\\\n', and left out the last three options, which are those of the generator for Step-3.5-Flash.
// What it prints is held against the plan in tests/unit/test_generators.py.
const options = {
  hardware: {
    name: 'hardware',
    title: 'Hardware Platform',
    items: [
      { id: 'hopper', label: 'Hopper', default: true },
      { id: 'b200_b300', label: 'B200/B300', default: false },
      { id: 'gb200_gb300', label: 'GB200/GB300', default: false }
    ]
  },
  quantization: {
    name: 'quantization',
    title: 'Quantization',
    getDynamicItems: (values) => {
      // Hopper has no NVFP4, it is shown for Blackwell alone
      const isHopper = values.hardware === 'hopper';
      return [
        { id: 'bf16', label: 'BF16', default: true },
        { id: 'fp8', label: 'FP8', default: false },
        ...(isHopper ? [] : [{ id: 'nvfp4', label: 'NVFP4', default: false }])
      ];
    }
  },
  reasoningParser: {
    name: 'reasoningParser',
    items: [{ id: 'disabled', default: true }, { id: 'enabled', default: false }],
    commandRule: value => value === 'enabled' ? '--reasoning-parser step3p5' : null
  },
  toolcall: {
    name: 'toolcall',
    items: [{ id: 'disabled', default: true }, { id: 'enabled', default: false }],
    commandRule: value => value === 'enabled' ? '--tool-call-parser step3p5' : null
  },
  speculative: {
    name: 'speculative',
    items: [{ id: 'disabled', default: true }, { id: 'enabled', default: false }],
    commandRule: value => {
      if (value !== 'enabled') return null;
      let cmd = '--speculative-algorithm EAGLE \\\n  --speculative-num-steps 3 \\\n  --speculative-eagle-topk 1 \\\n  --speculative-num-draft-tokens 4 \\\n  --enable-multi-layer-eagle ';
      return cmd;
    }
  }
};
const generateCommand = (values) => {
  const { hardware, quantization } = values;
  const isNVFP4 = quantization === 'nvfp4';
  const quantSuffix = quantization === 'fp8' ? '-FP8' : quantization === 'nvfp4' ? '-NVFP4' : '';
  const modelName = `stepfun-ai/Step-3.7-Flash${quantSuffix}`;
  const tpValue = hardware === 'gb200_gb300' ? 4 : 8;
  let cmd = 'sglang serve \\\n' + `  --model-path ${modelName}`;
  if (tpValue > 1) cmd += ` \\\n  --tp ${tpValue}`;
  if (quantSuffix === '-FP8' || isNVFP4) cmd += ` \\\n  --ep ${tpValue}`;
  if (isNVFP4) {
    cmd += ' \\\n  --moe-runner-backend flashinfer_trtllm';
    cmd += ' \\\n  --kv-cache-dtype fp8_e4m3';
    cmd += ' \\\n  --quantization modelopt_fp4';
    cmd += ' \\\n  --attention-backend trtllm_mha';
  }
  cmd += ' \\\n  --trust-remote-code';
  for (const [key, option] of Object.entries(options)) {
    if (option.commandRule) {
      const rule = option.commandRule(values[key], values);
      if (rule) cmd += ` \\\n  ${rule}`;
    }
  }
  return cmd;
};
