//! Reports of a synthetic study: its files, its page, and the page in a browser.

mod browser;
mod files;
mod invented;
mod reading;
