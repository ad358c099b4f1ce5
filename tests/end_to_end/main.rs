//! Tests over several crates, and of a real model where one is at hand.

mod smollm2;
