//! Runs the journey suite against a storefront that is already open:
//! `cargo run -p storefront --example journey -- http://127.0.0.1:8080`

#[path = "../../tests/it/journey.rs"]
mod journey;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::args().nth(1).ok_or_else(|| anyhow::anyhow!("the storefront's address is missing"))?;
    let began = std::time::Instant::now();
    journey::run(&url, "manual").await?;
    println!("the journey passed in {:.1} s", began.elapsed().as_secs_f64());
    Ok(())
}
