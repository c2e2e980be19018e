//! What `weir dev` is doing, on standard error: spinners on a terminal, plain lines elsewhere.
//!
//! Invariant: standard output is never touched. Colours only on a terminal, and never with NO_COLOR set.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// All stages of one start.
pub(super) struct Progress {
    terminal: Option<MultiProgress>,
    colour: bool,
}

/// One thing under way. Say how it ended with [`Stage::done`].
#[derive(Clone)]
pub(super) struct Stage {
    spinner: Option<ProgressBar>,
    colour: bool,
}

impl Progress {
    pub(super) fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { terminal: terminal.then(MultiProgress::new), colour }
    }

    /// Begins a stage: `text` says what happens.
    pub(super) fn stage(&self, text: &str) -> Stage {
        let Some(terminal) = &self.terminal else {
            eprintln!("weir dev: {text} ...");
            return Stage { spinner: None, colour: false };
        };
        let spinner = terminal.add(ProgressBar::new_spinner());
        spinner.set_style(style(if self.colour { "{spinner:.cyan} {msg}" } else { "{spinner} {msg}" }));
        spinner.set_message(text.to_owned());
        spinner.enable_steady_tick(Duration::from_millis(90));
        Stage { spinner: Some(spinner), colour: self.colour }
    }

    /// Says something that is no stage.
    pub(super) fn note(&self, text: &str) {
        match &self.terminal {
            Some(terminal) => terminal.suspend(|| eprintln!("  {text}")),
            None => eprintln!("weir dev: {text}"),
        }
    }

    /// Leaves what is on the screen alone from now on: others will write below it.
    pub(super) fn finish(&self) {
        if let Some(terminal) = &self.terminal {
            terminal.set_draw_target(ProgressDrawTarget::hidden());
        }
    }

    /// Takes unfinished stages off the screen.
    pub(super) fn clear(&self) {
        if let Some(terminal) = &self.terminal {
            let _ = terminal.clear(); // Only fails if the terminal is gone.
        }
    }
}

impl Stage {
    /// Says how far it is.
    pub(super) fn update(&self, text: &str) {
        match &self.spinner {
            Some(spinner) => spinner.set_message(text.to_owned()),
            None => eprintln!("weir dev: {text}"),
        }
    }

    /// Ends it well.
    pub(super) fn done(&self, text: &str) {
        match &self.spinner {
            Some(spinner) => {
                spinner.set_style(style("{msg}"));
                let tick = if self.colour { "\x1b[32m✓\x1b[0m" } else { "✓" };
                spinner.finish_with_message(format!("{tick} {text}"));
            }
            None => eprintln!("weir dev: {text}"),
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}
