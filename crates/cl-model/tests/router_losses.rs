//! Auxiliary router losses against Transformers, whose values fixtures/make_router_losses.py computed.

use cl_adapters::RouterRecord;
use cl_model::router_losses;
use cl_torch::tch::Tensor;
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    top_k: i64,
    logits: Vec<Vec<Vec<f32>>>,
    load_balancing: f64,
    d_load_balancing: Vec<Vec<Vec<f64>>>,
    z_loss: f64,
    d_z_loss: Vec<Vec<Vec<f64>>>,
}

fn records(case: &Case) -> Vec<RouterRecord> {
    let record = |rows: &Vec<Vec<f32>>| {
        let logits = Tensor::from_slice2(rows).set_requires_grad(true);
        RouterRecord { router: String::new(), gates: logits.detach(), logits, top_k: case.top_k }
    };
    case.logits.iter().map(record).collect()
}

/// The largest difference between the gradients of the leaves and the expected ones.
fn largest_difference(records: &[RouterRecord], expected: &[Vec<Vec<f64>>]) -> f64 {
    let of = |(record, rows): (&RouterRecord, &Vec<Vec<f64>>)| {
        (record.logits.grad() - Tensor::from_slice2(rows)).abs().max().double_value(&[])
    };
    records.iter().zip(expected).map(of).fold(0.0, f64::max)
}

#[test]
fn load_balancing_and_z_loss_are_those_of_transformers() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("fixtures/router_losses.json")).unwrap();
    for case in &cases {
        let own = records(case);
        let losses = router_losses(&own).unwrap();
        // f32 logits of order 1; the reference computes its sums in f32.
        let difference = (losses.load_balancing.double_value(&[]) - case.load_balancing).abs();
        assert!(difference < 1e-6, "{difference:.1e}");
        losses.load_balancing.backward();
        assert!(largest_difference(&own, &case.d_load_balancing) < 1e-6);

        let own = records(case);
        let z_loss = router_losses(&own).unwrap().z_loss;
        let difference = (z_loss.double_value(&[]) - case.z_loss).abs();
        assert!(difference < 1e-6 * case.z_loss.max(1.0), "{difference:.1e}");
        z_loss.backward();
        assert!(largest_difference(&own, &case.d_z_loss) < 1e-6);
    }
    assert!(router_losses(&[]).is_none());
}

#[test]
fn equal_use_of_all_experts_gives_k_and_a_single_favourite_more() {
    // Two experts, each of which is the first choice of half of the tokens, with the same probability.
    let balanced = Tensor::from_slice2(&[[1f32, -1.0], [-1.0, 1.0]]);
    let record = |logits: Tensor| RouterRecord { router: String::new(), gates: logits.copy(), logits, top_k: 1 };
    let of = |logits| router_losses(&[record(logits)]).unwrap().load_balancing.double_value(&[]);
    assert!((of(balanced) - 1.0).abs() < 1e-7);
    // All tokens go to the first expert: 2 · 1 · p, p = 1/(1 + exp(−2)).
    assert!((of(Tensor::from_slice2(&[[1f32, -1.0], [1.0, -1.0]])) - 2.0 / (1.0 + (-2f64).exp())).abs() < 1e-6);
}
