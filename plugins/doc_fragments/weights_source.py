"""Options of every module that asks for weights: which, and from where (`weights_request.SOURCE_ARGUMENTS`)."""

from __future__ import annotations


class ModuleDocFragment:
    """Which weights are wanted, and where they come from."""

    DOCUMENTATION = r"""
options:
  model_id:
    description: The model, as C(owner/name).
    type: str
    required: true
  revision:
    description: Branch, tag or commit.
    type: str
    default: master
  path:
    description: Directory that holds the files, absolute and for this revision alone.
    type: path
    required: true
  endpoint:
    description: The hub's URL; empty is the public one of O(source). Variables and logins on the node do not count.
    type: str
    default: ''
  token_file:
    description:
      - File on the node that holds the hub's token.
      - The token reaches the client by its environment only, and is blotted out of what the client prints.
    type: path
    default: ''
  include:
    description: Patterns of the files wanted; empty means all. They match whole paths, C(*) also across C(/).
    type: list
    elements: str
    default: []
  exclude:
    description: Patterns of the files not wanted, after O(include).
    type: list
    elements: str
    default: []
  full_check_below_bytes:
    description: A model of at most so many bytes in all is always checked in full.
    type: int
    default: 0
  source:
    description:
      - Where the files come from.
      - With V(directory) and V(archive) their hashes are held against a manifest of this module or C(SHA256SUMS) in
        it, where there is one.
    type: str
    choices: [modelscope, huggingface, directory, archive]
    default: modelscope
  listing:
    description:
      - What another node that is complete has of it, as M(stepladder.core.weights_look) tells, in place of the
        source's own list. A branch that moved meanwhile is then not followed by some nodes alone.
    type: list
    elements: dict
    default: []
  seen:
    description:
      - What an earlier M(stepladder.core.weights_look) of the same run has read of files that were touched, as it tells
        in C(touched). A file that has the same stamps still is not read again, unless every byte is to be read.
    type: list
    elements: dict
    default: []
  source_path:
    description: The directory, or the tar archive, on the node.
    type: path
    default: ''
"""
