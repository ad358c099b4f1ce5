use regex::Regex;

use crate::{AdapterError, TargetModules};

/// A validated `target_modules`, which can be matched against names.
pub struct Targets(Rule);

enum Rule {
    AllLinear,
    Names(Vec<String>),
    Whole(Regex),
}

impl Targets {
    /// Checks `target` against the names of a model's linear layers and its embedding, so that a misspelled entry is an
    /// error and does not silently reduce what is trained.
    ///
    /// # Errors
    /// Returns [`AdapterError::UnknownTarget`] or [`AdapterError::Pattern`].
    pub fn new(target: &TargetModules, layers: &[&str]) -> Result<Targets, AdapterError> {
        let (rule, entries) = match target {
            TargetModules::Pattern(p) if p == "all-linear" => return Ok(Targets(Rule::AllLinear)),
            TargetModules::Pattern(p) => {
                let whole = Regex::new(&format!("^(?:{p})$"))
                    .map_err(|source| AdapterError::Pattern { pattern: p.clone(), source })?;
                (Rule::Whole(whole), vec![p.clone()])
            }
            TargetModules::Names(names) => (Rule::Names(names.clone()), names.clone()),
        };
        let targets = Targets(rule);
        for entry in entries {
            let one = match &targets.0 {
                Rule::Names(_) => Targets(Rule::Names(vec![entry.clone()])),
                Rule::Whole(r) => Targets(Rule::Whole(r.clone())),
                Rule::AllLinear => Targets(Rule::AllLinear),
            };
            if !layers.iter().any(|name| one.contains(name)) {
                return Err(AdapterError::UnknownTarget { target: entry, available: last_parts(layers) });
            }
        }
        Ok(targets)
    }

    /// Whether the layer with this name gets an adapter.
    pub fn contains(&self, name: &str) -> bool {
        match &self.0 {
            Rule::AllLinear => name != "lm_head" && !name.ends_with("embed_tokens") && !is_router(name),
            Rule::Names(names) => names.iter().any(|n| name == n || name.ends_with(&format!(".{n}"))),
            Rule::Whole(pattern) => pattern.is_match(name),
        }
    }
}

/// Whether a layer is the router of a mixture of experts: Mixtral's, Qwen2-MoE's, or that of a mixture of this project.
/// Routers are not linear layers in Transformers and PEFT.
pub fn is_router(name: &str) -> bool {
    [".block_sparse_moe.gate", ".mlp.gate", ".router"].iter().any(|end| name.ends_with(end))
}

fn last_parts(names: &[&str]) -> Vec<String> {
    let mut parts: Vec<&str> = names.iter().map(|n| n.rsplit('.').next().unwrap_or(n)).collect();
    parts.sort_unstable();
    parts.dedup();
    parts.into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYERS: [&str; 3] = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"];

    fn chosen(target: TargetModules) -> Vec<&'static str> {
        let targets = Targets::new(&target, &LAYERS).unwrap();
        LAYERS.into_iter().filter(|n| targets.contains(n)).collect()
    }

    #[test]
    fn names_patterns_and_all_linear() {
        assert_eq!(chosen(TargetModules::default()), LAYERS[..2]);
        assert_eq!(chosen(TargetModules::Names(vec!["q_proj".into()])), LAYERS[..1]);
        assert_eq!(chosen(TargetModules::Pattern(r".*\.(up|q)_proj".into())), LAYERS[..2]);
        assert_eq!(chosen(TargetModules::Names(vec!["lm_head".into()])), LAYERS[2..]);
    }

    #[test]
    fn all_linear_leaves_routers_out() {
        let layers = ["a.mlp.gate", "a.mlp.experts.0.gate_proj", "a.block_sparse_moe.gate", "a.mlp.router"];
        let targets = Targets::new(&TargetModules::default(), &layers).unwrap();
        assert_eq!(layers.map(|name| targets.contains(name)), [false, true, false, false]);
        let named = Targets::new(&TargetModules::Names(vec!["gate".into()]), &layers).unwrap();
        assert_eq!(layers.map(|name| named.contains(name)), [true, false, true, false]);
    }

    #[test]
    fn a_string_in_place_of_a_list_is_an_error_that_says_what_to_write() {
        let message =
            |pattern: &str| Targets::new(&TargetModules::Pattern(pattern.into()), &LAYERS).err().unwrap().to_string();
        assert!(message("q_proj").ends_with(r#"so write ["q_proj"]"#), "{}", message("q_proj"));
        assert!(message("all_linear").ends_with(r#"did you mean "all-linear"?"#), "{}", message("all_linear"));
        assert!(message("x_proj").ends_with("up_proj"), "{}", message("x_proj"));
    }

    #[test]
    fn an_invalid_regular_expression_is_an_error_that_says_so_once() {
        let error = Targets::new(&TargetModules::Pattern("(q_proj".into()), &LAYERS).err().unwrap();
        assert!(error.to_string().contains("unclosed group"), "{error}");
        assert!(std::error::Error::source(&error).is_none());
    }

    #[test]
    fn a_misspelt_name_is_an_error_that_lists_the_right_ones() {
        let target = TargetModules::Names(vec!["q_proj".into(), "v_porj".into()]);
        let message = Targets::new(&target, &LAYERS).err().unwrap().to_string();
        assert!(message.contains("`v_porj`") && message.contains("lm_head, q_proj, up_proj"), "{message}");
    }
}
