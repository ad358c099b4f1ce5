//! Stages that build mixtures of experts, train their routers and collect router statistics.

use std::path::{Path, PathBuf};

use cl_checkpoint::files::write_file;
use cl_data::{ChatTemplate, Columns, Encoded, Encoding, Format, Joint};
use cl_moe::{
    BlendConfig, BlendExpert, BlendPlan, BlendRouter, ExpertConfig, ExpertStorage, MixConfig, MixModule, MixOptions,
    Mixture, Pooling, RouterConfig, blend, mix,
};
use cl_report::{Routing, TaskRouting};
use cl_train::{Precision, TrainConfig};

use super::work::{Inputs, Site};
use crate::model_dir::mixture_error;
use crate::router_round::train_routers_on;
use crate::routing::routing_report;
use crate::{DataConfig, LabError, LoadedModel, MixtureConfig, Observer, RouterOutput, RouterRun, router_states};

/// Number of rows per round from which router statistics are computed; the first rows are used.
const ROWS: usize = 16;
/// Number of these rows per forward pass.
const AT_ONCE: usize = 4;

impl Site<'_> {
    /// Builds a mixture of adapters.
    pub(super) fn blend(&self, router: &BlendRouter, inputs: &Inputs, out: &Path) -> Result<(), LabError> {
        let experts = inputs.dirs.iter().map(|adapter| BlendExpert::of_adapter(adapter.clone())).collect();
        let base_model = self.config.model.clone();
        let (router, general_adapters) = (router.clone(), Vec::new());
        let config = BlendConfig { base_model, num_experts_per_tok: None, router, general_adapters, experts };
        let plan = BlendPlan::new(&config, false).map_err(mixture_error(out))?;
        blend(&plan, out, false, self.interrupt).map_err(mixture_error(out))?;
        Ok(())
    }

    /// Builds a mixture of fully fine-tuned models. With `prompts`, its router weights are computed from the hidden
    /// states of that many prompts from each expert's round.
    pub(super) fn mix(
        &self,
        router: &RouterConfig,
        num_experts_per_tok: usize,
        prompts: Option<usize>,
        inputs: &Inputs,
        out: &Path,
    ) -> Result<(), LabError> {
        let mut config = MixConfig {
            expert_storage: ExpertStorage::Full,
            base_model: self.config.model.clone(),
            architecture: None,
            num_experts_per_tok: Some(num_experts_per_tok),
            gateless: false,
            global_router: false,
            dtype: None,
            modules: vec![MixModule::Mlp],
            layers: None,
            shared_expert: None,
            router: router.clone(),
            experts: inputs
                .dirs
                .iter()
                .zip(&inputs.experts)
                .map(|(m, &round)| self.expert(m, round, prompts))
                .collect(),
        };
        if prompts.is_some() {
            let states = out.with_file_name("router_states.safetensors");
            config.router.pooling = Some(Pooling::Mean);
            let bytes = router_states(&config, Precision::F32, self.device)?;
            write_file(&states, &bytes)?;
            config.router.states = Some(states);
        }
        let plan = cl_moe::Plan::new(&config).map_err(mixture_error(out))?;
        let options = MixOptions { interrupt: self.interrupt.clone(), ..MixOptions::default() };
        mix(&plan, out, &options, &|_| ()).map_err(mixture_error(out))?;
        Ok(())
    }

    fn expert(&self, model: &Path, round: usize, prompts: Option<usize>) -> ExpertConfig {
        let rows = self.datasets[round].iter().flat_map(|set| &set.examples);
        let positive_prompts = rows.take(prompts.unwrap_or(0)).map(|row| row.shown()).collect();
        ExpertConfig { model: model.to_owned(), positive_prompts, negative_prompts: Vec::new() }
    }

    /// Trains the routers of the mixture that the stage depends on, and loads the result.
    pub(super) fn train_routers(
        &self,
        train: &TrainConfig,
        seed: u64,
        limit: Option<usize>,
        inputs: &Inputs,
        out: &Path,
        observer: &mut Observer<'_>,
    ) -> Result<LoadedModel, LabError> {
        let mixture = &inputs.dirs[0];
        let of_adapters = Mixture::is_mixture(mixture);
        let base = &self.config.model;
        let data: Vec<PathBuf> = self.rounds.iter().flat_map(|round| round.data.clone()).collect();
        let run = RouterRun {
            model: if of_adapters { base.clone() } else { mixture.clone() },
            adapter: of_adapters.then(|| mixture.clone()),
            seed,
            profile: self.config.profile,
            device: self.config.device.clone(),
            data: DataConfig {
                train: data,
                format: Format::Auto,
                columns: Columns::default(),
                limit,
                earlier: Vec::new(),
            },
            train: TrainConfig { router: None, ..train.clone() },
            router: train.router.unwrap_or_default(),
            mixture: MixtureConfig { joint: Joint::Uniform },
        };
        let data = self.datasets.concat();
        let RouterOutput { mixture, .. } =
            train_routers_on(&run, &data, self.device, out, true, self.interrupt, observer)?;
        if of_adapters { self.load(base, Some(&mixture)) } else { self.load(&mixture, None) }
    }

    /// Computes each expert's share of the gates, by round.
    pub(super) fn routing(&self, loaded: &mut LoadedModel, inputs: &Inputs) -> Result<Routing, LabError> {
        let chat = ChatTemplate::from_dir(&self.config.model)?;
        let max_length = self.config.train.max_length;
        let encoding =
            Encoding { tokenizer: &loaded.tokenizer, chat: chat.as_ref(), max_length, profile: self.config.profile };
        let mut tasks: Vec<(String, Vec<Encoded>)> = Vec::new();
        for (round, sets) in self.rounds.iter().zip(self.datasets) {
            let mut rows = Vec::new();
            for set in sets {
                let first = &set.examples[..set.examples.len().min(ROWS - rows.len())];
                rows.extend(encoding.examples(first).map_err(LabError::data(&set.path))?);
            }
            tasks.push((round.name.clone(), rows));
        }
        let experts: Vec<String> = inputs.experts.iter().map(|&round| self.rounds[round].name.clone()).collect();
        let report = routing_report(&mut loaded.model, &tasks, experts.clone(), &|_, _| true, AT_ONCE)?;
        let tasks = report.tasks.into_iter();
        let tasks = tasks.map(|t| TaskRouting { task: t.task, shares: t.routing.gate_share }).collect();
        Ok(Routing { experts, tasks })
    }
}
