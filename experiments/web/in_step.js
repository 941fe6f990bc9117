// Two players in step: what is done to one is done to the other.
(() => {
  // Seconds that two playing decoders may be apart: below a frame of the bench's videos, which have 8 a second.
  const NEAR = 0.1;
  // Where a player was last told to go: seeking to that place is no wish of the user. A note that ends with the seek
  // would not do: a second seek may begin before the end of the first is heard of.
  const told = new WeakMap();

  const follows = (player) =>
    told.has(player) && Math.abs(told.get(player) - player.currentTime) <= (player.paused ? 0.001 : NEAR);

  const twin = (player) => [...document.querySelectorAll("video.in-step")].find((other) => other !== player);

  const bring = (other, player) => {
    const near = player.paused ? 0 : NEAR;
    if (Math.abs(other.currentTime - player.currentTime) <= near) return;
    told.set(other, player.currentTime);
    other.currentTime = player.currentTime;
  };

  const answers = {
    play(player, other) {
      bring(other, player);
      if (other.paused) other.play();
    },
    pause(player, other) {
      if (other.paused) return;
      other.pause();
      bring(other, player);
    },
    seeking(player, other) {
      if (follows(player)) return;
      told.delete(player);
      bring(other, player);
    },
    ratechange(player, other) {
      other.playbackRate = player.playbackRate;
    },
  };

  // Media events do not bubble, and the players come and go with every answer: the document catches them on their way.
  for (const [name, act] of Object.entries(answers)) {
    const listen = ({ target }) => {
      if (!target.matches?.("video.in-step")) return;
      const other = twin(target);
      if (other) act(target, other);
    };
    document.addEventListener(name, listen, { capture: true });
  }
})();
