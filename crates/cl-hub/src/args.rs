use cl_checkpoint::Interrupt;

use crate::{Hub, Names};

/// The option `--hub` of commands.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct HubArgs {
    /// Download models, adapters and data sets that are not local files from the Hugging Face Hub: names such as
    /// organization/name or organization/name@revision (HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE).
    #[arg(long)]
    pub hub: bool,
}

impl HubArgs {
    /// Returns the Hub, if downloads are allowed.
    pub fn hub(self) -> Option<Hub> {
        self.hub.then(Hub::from_env)
    }

    /// Returns a resolver for names of models.
    pub fn names(self, interrupt: &Interrupt) -> Names {
        Names { hub: self.hub(), interrupt: interrupt.clone() }
    }
}
