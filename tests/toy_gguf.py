"""A GGUF file of a toy model, as llama.cpp writes it."""

import json


def write_gguf(gguf, path, model, tokenizer, bos=1, pad=None, output=None):
    "A llama.cpp file of the toy, 32-bit floats; `output`: the matrix of an output layer of its own."
    c, w = model.config, gguf.GGUFWriter(str(path), "llama")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_rope_freq_base(10000.0)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    w.add_tokenizer_model("gpt2")
    w.add_token_list(tokens)
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["merges"]])
    w.add_token_types([3 if t.startswith(("<|", "<｜", "<think", "</think")) else 1 for t in tokens])
    w.add_bos_token_id(bos)
    w.add_eos_token_id(tokenizer.eos_token_id)
    if pad is not None:
        w.add_pad_token_id(pad)
        w.add_add_bos_token(False)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    w.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    w.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    if output is not None:
        w.add_tensor("output.weight", output.detach().numpy())
    for i, layer in enumerate(model.model.layers):
        for theirs, ours in names.items():
            weight = layer.get_submodule(theirs).weight.detach()
            if ours in ("attn_q", "attn_k"):  # llama.cpp interleaves the rotated halves
                heads = c.num_attention_heads if ours == "attn_q" else c.num_key_value_heads
                weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            w.add_tensor(f"blk.{i}.{ours}.weight", weight.contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
