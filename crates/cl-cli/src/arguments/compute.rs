//! Arguments of commands that run a model: dtype, quantization and device.

use cl_checkpoint::Precision;

/// How a model is loaded and computed.
#[derive(clap::Args)]
pub struct ComputeArgs {
    /// Dtype of the computation.
    #[arg(long, value_parser = super::values::precision(), default_value = "f32")]
    pub precision: Precision,
    /// Keep the weights of the model's linear layers in this format in memory, as in training with [train.lora] base.
    #[arg(long, value_name = "FORMAT", value_parser = ["nf4", "int8"])]
    pub quantize: Option<String>,
    /// Device: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: String,
}
