//! Model card of an adapter, with the metadata that the Hugging Face Hub reads.

/// Returns a card with a title, a description of what was done, and the inputs.
pub(super) fn card(base: Option<&str>, title: &str, done: &str, inputs: &[(String, String)], settings: &str) -> String {
    let quoted = |name: &str| serde_json::to_string(name).unwrap_or_default();
    let base = base.map_or(String::new(), |base| format!("base_model: {}\n", quoted(base)));
    let list: String = inputs.iter().map(|(name, role)| format!("- `{name}` ({role})\n")).collect();
    format!(
        "---\n{base}library_name: peft\ntags:\n- lora\n- merge\n- cl-merge\n---\n# {title}\n\n{done}\n\n\
         Made with cl-merge {}.\nIt loads with PEFT as any LoRA adapter; its scaling is one.\n\n## Inputs\n\n{list}\n\
         ## Settings\n\nAll settings, defaults filled in, as in `manifest.json`:\n\n```json\n{settings}\n```\n",
        env!("CARGO_PKG_VERSION")
    )
}
