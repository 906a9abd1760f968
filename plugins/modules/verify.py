# Documentation only: the action plugin of the same name runs it, on the controller (plugins/action/verify.py).

DOCUMENTATION = r"""
module: verify
short_description: Check a deployed OpenAI-compatible endpoint
description:
  - Asks the endpoint with the openai client, as its users do, and judges the answers - models list, chat, reasoning
    split from content, streaming, completion, a forced tool call, refusal of an unknown model.
  - Each check says what kind of proof it is - V(exact) text of a rehearsal model, V(protocol), or V(sense), a fact that
    the model knows.
  - Runs on the controller; shows each check as it ends, then a table.
  - The first request that finds no server, is refused for its key or gets no answer in time is the last one; the checks
    after it are reported as not run.
options:
  base_url:
    description: The endpoint, ending in V(/v1), without user name, password and query.
    type: str
    required: true
  served_name:
    description: The model's name in the API.
    type: str
    required: true
  reasoning:
    description: The server runs with a reasoning parser, so that reasoning is to be split from content.
    type: bool
    required: true
  tool_calls:
    description: The server runs with a tool call parser.
    type: bool
    required: true
  api_key_file:
    description: File on the controller that holds the API key. Without it the key is V(EMPTY), for servers without one.
    type: path
  exact:
    description:
      - The fixed answers of a rehearsal model.
      - A field left out is not compared; space at the ends does not count.
    type: dict
    suboptions:
      answer:
        description: The content of the chat answer.
        type: str
        required: true
      reasoning:
        description: The reasoning before the chat answer.
        type: str
      tool_reasoning:
        description: The reasoning before the tool call.
        type: str
      tool_name:
        description: The tool called.
        type: str
      tool_arguments:
        description: The arguments of the call.
        type: dict
  sense:
    description: Ask for a fact where O(exact) is omitted. False for random weights.
    type: bool
    default: true
  rejects_unknown_model:
    description:
      - The server answers 404 for a model that it does not serve.
      - vLLM does; SGLang answers as if the name were its own.
    type: bool
    default: true
  max_tokens:
    description:
      - Tokens for one answer, reasoning included.
      - With the prompt (up to 300 tokens) it must fit the context length.
    type: int
    default: 512
  request_timeout:
    description: Seconds for one whole answer.
    type: float
    default: 120
  deadline:
    description: Seconds for all checks together.
    type: float
    default: 600
  report_file:
    description: File on the controller to write the report to, as JSON. Its directory is made.
    type: path
notes:
  - Run it once for an endpoint, not once for each of its nodes.
  - A proxy named in the controller's environment is not used.
  - In check mode no request is made, and the task is skipped.
attributes:
  check_mode:
    support: full
    description: Makes no request and is skipped with the reason.
  diff_mode:
    support: none
    description: Changes nothing.
author:
  - Stepladder contributors
"""

EXAMPLES = r"""
- name: Verify the endpoint
  stepladder.core.verify:
    base_url: http://10.0.0.11:8000/v1
    api_key_file: secrets/step3-api-key
    served_name: step3
    reasoning: true
    tool_calls: true
    report_file: reports/step3-verify.json

- name: Verify a rehearsal, whose answers are known to the letter
  stepladder.core.verify:
    base_url: http://127.0.0.1:8000/v1
    served_name: step3p5-tiny
    reasoning: true
    tool_calls: true
    max_tokens: 256
    exact:
      reasoning: The user wants a smoke test reply.
      answer: Hello from the tiny CPU model!
      tool_reasoning: I should call get_weather now.
      tool_name: get_weather
      tool_arguments:
        city: Paris
"""

RETURN = r"""
report:
  description: All checks, in the order made.
  returned: unless skipped
  type: dict
  contains:
    passed:
      description: Every check was made and passed.
      type: bool
      sample: true
    endpoint:
      description: The endpoint asked.
      type: str
      sample: http://10.0.0.11:8000/v1
    model:
      description: The model asked for.
      type: str
      sample: step3
    failed:
      description: Names of the checks that failed.
      type: list
      elements: str
      sample: []
    not_run:
      description: Names of the checks that were not made.
      type: list
      elements: str
      sample: []
    checks:
      description: One entry for each check.
      type: list
      elements: dict
      contains:
        name:
          description: The check.
          type: str
          sample: tool call
        passed:
          description: It was made and all was right.
          type: bool
          sample: true
        ran:
          description: It was made.
          type: bool
          sample: true
        seconds:
          description: Time taken, in seconds.
          type: float
          sample: 0.124
        detail:
          description: What was seen, in short; for a check that was not made, why.
          type: str
          sample: 'get_weather {"city": "Paris"}, finish_reason stop'
        expected:
          description: What should have been seen; null unless the check failed.
          type: str
          sample: null
        basis:
          description: What kind of proof it is.
          type: str
          choices: [exact, protocol, sense]
          sample: exact
"""
