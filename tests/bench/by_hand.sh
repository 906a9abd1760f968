#!/usr/bin/env bash
# What somebody types who serves the same model by hand: install, make the model and its hub, download, serve, ask once.
# by_hand.sh WORK ENGINE_LOCK TOOLS_LOCK PROGRAMS PORT HUB_PORT; INSTALLER is uv or pip, UV names uv.
set -euo pipefail
work=$1 lock=$2 tools=$3 programs=$4 port=$5 hub_port=$6
mkdir -p "$work"

configured() { python3 -m pip config list | sed -n "s/^.*\.$1='\(.*\)'$/\1/p" | head -n 1; }
install() { # VENV ARGUMENTS...
  local venv=$1
  shift
  python3 -m venv "$venv"
  if [ "$INSTALLER" = uv ]; then
    UV_FIND_LINKS=$(configured find-links | tr ' ' ',') UV_DEFAULT_INDEX=$(configured index-url) \
      UV_INDEX=$(configured extra-index-url) UV_INDEX_STRATEGY=unsafe-best-match \
      "$UV" pip install -q --python "$venv/bin/python" --no-deps "$@"
  else
    "$venv/bin/pip" install -q --no-deps "$@"
  fi
}

install "$work/engine" --require-hashes -r "$lock"
install "$work/engine" torch==2.13.0+cpu
install "$work/tools" --require-hashes -r "$tools"
site=$("$work/engine/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"

"$work/engine/bin/python" "$programs/tiny_model.py" "$work/hub/stepladder/tiny-step3p5" --architecture step3p5 >/dev/null
"$work/engine/bin/python" "$programs/hub.py" --root "$work/hub" --port "$hub_port" >"$work/hub.log" 2>&1 &
hub=$!
engine=
trap 'kill $hub $engine 2>/dev/null; wait' EXIT
for _ in $(seq 50); do curl -fs -o /dev/null "http://127.0.0.1:$hub_port/healthz" && break; sleep 0.1; done
MODELSCOPE_ENDPOINT=http://127.0.0.1:$hub_port MODELSCOPE_HOME=$work/ms MODELSCOPE_CACHE=$work/ms \
  "$work/tools/bin/modelscope" download stepladder/tiny-step3p5 --local-dir "$work/model" >"$work/download.log" 2>&1

PATH=$work/engine/bin:$PATH HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 \
  "$work/engine/bin/vllm" serve "$work/model" --served-model-name tiny-step3p5 --host 127.0.0.1 --port "$port" \
  --reasoning-parser step3p5 --enable-auto-tool-choice --tool-call-parser step3p5 --trust-remote-code \
  --max-model-len 1024 --enforce-eager >"$work/engine.log" 2>&1 &
engine=$!
for _ in $(seq 600); do curl -fs -o /dev/null "http://127.0.0.1:$port/health" && break; sleep 0.5; done
curl -fs "http://127.0.0.1:$port/v1/chat/completions" -H 'Content-Type: application/json' \
  -d '{"model": "tiny-step3p5", "messages": [{"role": "user", "content": "Hello"}]}' >/dev/null
