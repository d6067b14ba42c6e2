"""Fields of OpenAI's and of vLLM's API for what this server does not have.

Many clients send every field that they know. So null passes, and so does a value that asks for nothing. Other values
are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import ApiError


class Unsupported(NamedTuple):
    """A field that this server does not have.

    Attributes:
        reason: A sentence for the client.
        neutral: Values beside null that ask for nothing.
    """

    reason: str
    neutral: tuple[Any, ...] = ()


_TEXT_ALONE = "the models read and write text alone"
_NO_REASONING = "the models do not reason before they answer"
_ONE_PROCESS = "a request runs in one process"

FOR_ALL: dict[str, Unsupported] = {
    # vLLM's
    "cache_salt": Unsupported("requests share cached prefixes, unless --no-enable-prefix-caching turns them off"),
    "ec_transfer_params": Unsupported(_ONE_PROCESS, ({},)),
    "kv_transfer_params": Unsupported(_ONE_PROCESS, ({},)),
    "logprob_token_ids": Unsupported("log-probabilities are those of the most likely tokens"),
    "priority": Unsupported("requests run in the order of their arrival", (0,)),
    "repetition_detection": Unsupported("repetition_penalty and frequency_penalty make a text repeat itself less"),
    "return_mm_kwargs": Unsupported(_TEXT_ALONE, (True, False)),
    "return_token_offsets": Unsupported("logprobs have the offsets of the tokens' texts", (False,)),
    "routed_experts_prompt_start": Unsupported("the models have no experts", (0,)),
    "stream_interval": Unsupported("each event has all tokens since the last one", (1,)),
    "thinking_token_budget": Unsupported(_NO_REASONING, (-1,)),
    "truncate_prompt_tokens": Unsupported("a prompt that is too long is refused"),
    "truncation_side": Unsupported("a prompt that is too long is refused"),
    "vllm_xargs": Unsupported("they are for extensions of vLLM", ({},)),
    "watermarking": Unsupported("texts have no watermark", (False,)),
}

FOR_COMPLETIONS: dict[str, Unsupported] = {
    "prompt_embeds": Unsupported("a prompt is a text or token ids"),
    "suffix": Unsupported("the models write no middle of a text", ("",)),
}

FOR_CHATS: dict[str, Unsupported] = {
    "audio": Unsupported(_TEXT_ALONE),
    "function_call": Unsupported("it is the older name of tool_choice", ("none", "auto")),
    "functions": Unsupported("it is the older name of tools", ([],)),
    "modalities": Unsupported(_TEXT_ALONE, (["text"],)),
    "moderation": Unsupported("no second model looks at texts"),
    "reasoning_effort": Unsupported(_NO_REASONING, ("none",)),
    "verbosity": Unsupported("a system message can ask for short or long answers", ("medium",)),
    "web_search_options": Unsupported("the server opens no web pages"),
    # vLLM's
    "add_special_tokens": Unsupported("the chat template writes the special tokens", (False,)),
    "chat_template": Unsupported("a template is a program, so it is for the operator to give: see --chat-template"),
    "echo": Unsupported("continue_final_message continues the last message", (False,)),
    "media_io_kwargs": Unsupported(_TEXT_ALONE, ({},)),
    "mm_processor_kwargs": Unsupported(_TEXT_ALONE, ({},)),
    "return_prompt_text": Unsupported("return_token_ids returns the prompt's tokens", (False,)),
}

_WHOLE_ENGINE = "the engine sleeps and wakes as a whole"
FOR_PAUSES: dict[str, Unsupported] = {
    "wait_for_inflight_requests": Unsupported('it is the older name of mode="wait"', ("false",)),
    # of /sleep, /wake_up and /reset_prefix_cache
    "tags": Unsupported(_WHOLE_ENGINE),
    "reset_external": Unsupported("there is no other prefix cache", ("false",)),
    "reset_running_requests": Unsupported("running requests keep what they have computed", ("false",)),
}
_NO_TRANSFER = "weights do not come over NCCL or CUDA IPC: let the trainer save them, and give update_info.checkpoint"
FOR_WEIGHTS: dict[str, Unsupported] = dict.fromkeys(
    [
        *("names", "dtype_names", "shapes", "packed", "packed_buffer_size_bytes", "packed_num_buffers"),
        *("ipc_handles", "ipc_handles_pickled", "is_checkpoint_format"),
    ],
    Unsupported(_NO_TRANSFER),
)

_NO_STATE = "the server keeps no responses, so send the whole conversation as input"
FOR_RESPONSES: dict[str, Unsupported] = {
    "access_programs": Unsupported("they are OpenAI's"),
    "background": Unsupported(_NO_STATE, (False,)),
    "background_options": Unsupported(_NO_STATE, ({},)),
    "context_management": Unsupported(_NO_STATE, ([],)),
    "conversation": Unsupported(_NO_STATE),
    "image": Unsupported(_TEXT_ALONE),
    "max_tool_calls": Unsupported("it limits hosted tools, and the server runs none"),
    "moderation": Unsupported("no second model looks at texts"),
    "previous_response_id": Unsupported(_NO_STATE),
    "prompt": Unsupported("the server keeps no prompts"),
    "reasoning": Unsupported(_NO_REASONING, ({}, {"effort": "none"})),
    # vLLM's
    "enable_response_messages": Unsupported("the items of the output have all that the model wrote", (False,)),
    "mm_processor_kwargs": Unsupported(_TEXT_ALONE, ({},)),
    "previous_input_messages": Unsupported(_NO_STATE),
    "previous_response": Unsupported(_NO_STATE),
}


def without_unsupported(fields: Any, unsupported: Mapping[str, Unsupported], place: str = "") -> Any:
    """Return a body without the fields that this server does not have.

    Args:
        fields: The body, as JSON has it.
        unsupported: The fields, by name.
        place: What stands before the names in errors.

    Raises:
        ApiError: A field asks for something.
    """
    if not isinstance(fields, dict):
        return fields
    for name in [name for name in fields if name in unsupported]:
        value, (reason, neutral) = fields[name], unsupported[name]
        # JSON's 0 is not its false, but Python's is.
        if value is not None and not any(value == each and type(value) is type(each) for each in neutral):
            name = place + name
            raise ApiError(400, f"{name} is not supported: {reason}.", name, "unsupported_parameter")
    return {name: value for name, value in fields.items() if name not in unsupported}
