"""Five chat templates in the style of released models, written for these tests: which turns keep reasoning, what the
prompt contains, what ends a turn."""

DEEPSEEK_V31 = """{%- set thinking = thinking | default(false) -%}
{%- set state = namespace(system='', asked=false) -%}
{%- for message in messages if message.role == 'system' -%}
  {%- set state.system = state.system + ('\\n\\n' if state.system else '') + message.content -%}
{%- endfor -%}
{{ bos_token }}{{ state.system }}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {%- set state.asked = true -%}
    {{ '<\uff5cUser\uff5c>' + message.content }}
  {%- elif message.role == 'assistant' -%}
    {{ '<\uff5cAssistant\uff5c></think>' if state.asked else '' }}
    {%- set state.asked = false -%}
    {%- if message.tool_calls -%}
      {{ message.content or '' }}{{ '<\uff5ctool\u2581calls\u2581begin\uff5c>' }}
      {%- for call in message.tool_calls -%}
        {{ '<\uff5ctool\u2581call\u2581begin\uff5c>' + call.function.name + '<\uff5ctool\u2581sep\uff5c>' + call.function.arguments + '<\uff5ctool\u2581call\u2581end\uff5c>' }}
      {%- endfor -%}
      {{ '<\uff5ctool\u2581calls\u2581end\uff5c>' }}
    {%- else -%}
      {{ message.content.split('</think>', 1)[-1] }}
    {%- endif -%}
    {{ eos_token }}
  {%- elif message.role == 'tool' -%}
    {{ '<\uff5ctool\u2581output\u2581begin\uff5c>' + message.content + '<\uff5ctool\u2581output\u2581end\uff5c>' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and state.asked -%}
  {{ '<\uff5cAssistant\uff5c>' + ('<think>' if thinking else '</think>') }}
{%- endif -%}"""

KIMI_K2_THINKING = """{%- macro head(message) -%}
  <|im_{{ message.role if message.role in ('user', 'assistant') else 'system' }}|>{{ message.name or message.role }}<|im_middle|>
{%- endmacro -%}
{%- macro calls(message) -%}
  {%- if message.tool_calls -%}
    <|tool_calls_section_begin|>
    {%- for call in message.tool_calls -%}
      <|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>
      {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}
      <|tool_call_end|>
    {%- endfor -%}
    <|tool_calls_section_end|>
  {%- endif -%}
{%- endmacro -%}
{%- set last = namespace(answer=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' and not message.tool_calls -%}{%- set last.answer = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}
{%- for message in messages -%}
  {{ head(message) }}
  {%- if message.role == 'assistant' -%}
    {{- '<think>' + (message.reasoning_content or '' if loop.index0 > last.answer else '') + '</think>' + (message.content or '') + calls(message) -}}
  {%- else -%}
    {{ message.content }}
  {%- endif -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""

GLM_46 = """[gMASK]<sop>
{%- if tools -%}<|system|>{{ '\\n' + (tools | tojson) }}{%- endif -%}
{%- set last = namespace(question=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    <|user|>{{ '\\n' + m.content }}{{ '/nothink' if enable_thinking is defined and not enable_thinking else '' }}
  {%- elif m.role == 'system' -%}
    <|system|>{{ '\\n' + m.content }}
  {%- elif m.role == 'assistant' -%}
    {%- set content = m.content or '' -%}
    {%- set thought = m.reasoning_content or '' -%}
    {%- if not thought and '</think>' in content -%}
      {%- set thought = content.split('</think>')[0].split('<think>')[-1] -%}
      {%- set content = content.split('</think>')[-1] -%}
    {%- endif -%}
    <|assistant|>{{ '\\n<think>' + (thought.strip() if loop.index0 > last.question else '') + '</think>' }}
    {{- '\\n' + content.strip() if content.strip() else '' }}
    {%- for call in m.tool_calls or [] -%}
      {{ '\\n<tool_call>' + call.function.name }}
      {%- for key, value in call.function.arguments.items() -%}
        {{ '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' + (value if value is string else value | tojson) + '</arg_value>' }}
      {%- endfor -%}
      {{ '\\n</tool_call>' }}
    {%- endfor -%}
  {%- elif m.role == 'tool' -%}
    {{ '<|observation|>' if messages[loop.index0 - 1].role != 'tool' else '' }}{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  <|assistant|>{{ '\\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}
{%- endif -%}"""

QWEN3 = """{%- if tools -%}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif -%}
{%- set last = namespace(question=-1) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
  {%- set content = message.content or '' -%}
  {%- if message.role == 'assistant' -%}
    {%- set thought = message.reasoning_content or '' -%}
    {%- if not thought and '</think>' in content -%}
      {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{ '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > last.question and (loop.last or thought) -%}
      {{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else -%}
      {{ content }}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
      {{ ('\\n' if content or not loop.first else '') + '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
    {%- endfor -%}
    {{ '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' -%}
    {{ '<|im_start|>user' if messages[loop.index0 - 1].role != 'tool' else '' }}{{ '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
    {{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' }}
  {%- else -%}
    {{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '') }}
{%- endif -%}"""

MISTRAL = """{{ bos_token }}
{%- if tools -%}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{ '[INST]' + message.content + '[/INST]' }}
  {%- elif message.role == 'system' -%}
    {{ '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
  {%- elif message.role == 'assistant' -%}
    {{ message.content or '' }}
    {%- for call in message.tool_calls or [] -%}
      {{ '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) }}
    {%- endfor -%}
    {{ eos_token }}
  {%- elif message.role == 'tool' -%}
    {{ '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
  {%- else -%}
    {{ raise_exception('roles are user, system, assistant and tool') }}
  {%- endif -%}
{%- endfor -%}"""
