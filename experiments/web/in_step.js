// Two players in step: what is done to one is done to the other.
(() => {
  // Seconds that two playing decoders may be apart: below a frame of the bench's videos, which have 8 a second.
  const NEAR = 0.1;
  // Players that are being brought to where the other is: their own seeking is no wish of the user.
  const following = new WeakSet();

  const twin = (player) => [...document.querySelectorAll("video.in-step")].find((other) => other !== player);

  const bring = (other, player) => {
    const near = player.paused ? 0 : NEAR;
    if (Math.abs(other.currentTime - player.currentTime) <= near) return;
    following.add(other);
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
      if (!following.has(player)) bring(other, player);
    },
    seeked(player) {
      following.delete(player);
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
