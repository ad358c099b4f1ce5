use cl_model::Decoder;
use cl_moe::{Mixture, RouterLogits, RouterNorm};

use crate::findings::note;
use crate::model_dir::{model_hash, open_checkpoint, open_mixture};
use crate::problem::RoutersProblem;
use crate::{Finding, LabError, RouterRun};

/// Checks that a router training run has routers, and that they affect the loss.
pub(crate) fn check_routers(config: &RouterRun, findings: &mut Vec<Finding>) {
    let choice = match &config.adapter {
        None => of_experts(config),
        Some(_) => note(of_adapters(config), findings),
    };
    let Some(Choice { experts, chosen, routers, sum_to_one }) = choice else { return };
    findings.push(Finding::Fact(format!("{routers} routers of {experts} experts, {chosen} for each token")));
    if chosen == 1 && sum_to_one {
        findings.push(finding(config, RoutersProblem::OneExpert));
    }
    if routers == 0 {
        findings.push(finding(config, RoutersProblem::NoRouters));
    }
    if config.router.load_balancing > 0.0 && experts == chosen {
        findings.push(Finding::Fact(
            "warning: every token goes through all experts, so the load-balancing loss is constant".to_owned(),
        ));
    }
}

/// How a router selects experts.
struct Choice {
    experts: usize,
    chosen: usize,
    routers: usize,
    /// Whether gates are renormalized to a sum of 1.
    sum_to_one: bool,
}

/// The experts of the model itself; `None` if it cannot be opened, which is already a finding.
fn of_experts(config: &RouterRun) -> Option<Choice> {
    let model = Decoder::check(&open_checkpoint(&config.model).ok()?).ok()?;
    Some(match model.experts {
        None => Choice { experts: 0, chosen: 0, routers: 0, sum_to_one: true },
        Some(experts) => Choice {
            experts: experts.routed() as usize,
            chosen: experts.num_experts_per_tok as usize,
            routers: experts.routers(),
            sum_to_one: experts.norm_topk_prob,
        },
    })
}

fn of_adapters(config: &RouterRun) -> Result<Choice, LabError> {
    let dir = config.adapter.as_ref().expect("asked for by the caller");
    let wrong = |problem| Err(LabError::Routers { path: dir.clone(), problem });
    if dir.exists() && !Mixture::is_mixture(dir) {
        return wrong(RoutersProblem::NoMixture);
    }
    let mixture = open_mixture(dir, &model_hash(&config.model)?)?;
    let mixture = mixture.config();
    if mixture.router_logits == RouterLogits::UpdateNorm {
        return wrong(RoutersProblem::UpdateNorm);
    }
    Ok(Choice {
        experts: mixture.experts.len(),
        chosen: mixture.num_experts_per_tok,
        routers: mixture.modules.len(),
        sum_to_one: mixture.router_norm != RouterNorm::Sigmoid,
    })
}

fn finding(config: &RouterRun, problem: RoutersProblem) -> Finding {
    let path = config.adapter.as_ref().unwrap_or(&config.model).clone();
    Finding::Problem(LabError::Routers { path, problem })
}
