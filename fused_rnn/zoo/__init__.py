"""Recurrent cells of the literature as formulas.

    layer = fused_rnn.Layer(fused_rnn.zoo.LiGRU(), 40, 256, num_layers=2, bidirectional=True)

Each class says its paper and its equations. In the equations W x is a gate's block of weight_ih, U h its block of weight_hh,
and b their biases together. `from_torchrecurrent` makes layers of torchrecurrent ours, `antisymmetric` keeps the recurrent
weights of two cells antisymmetric, fused_rnn.zoo.activations lists the activations.

In the table, (x) marks a gate without recurrent product, (h) one without input product. Left out: cells that need a sum over
units, which no formula has (MC-LSTM of Hoedt et al. 2021, whose redistribution is a softmax).

cell                   paper                           gates                  states           products and norms inside
---------------------  ------------------------------  ---------------------  ---------------  -------------------------
AntisymmetricRNN       Chang et al. 2019               a                      h
ATR                    Zhang et al. 2018               p                      h
BlockGRU               Hafner et al. 2023              r n u                  h                3 RMS norms
BRC                    Vecoven et al. 2021             a c g (x)              h
CFN                    Laurent and von Brecht 2017     theta eta g(x)         h
CoRNN                  Rusch and Mishra 2021           a                      h z              product z
CoupledLSTM            Greff et al. 2017               f g o                  h c
DreamerGRU             Hafner et al. 2023              a                      h                5 products, 2 RMS norms
DSGU                   Gao and Glowacka 2016           g(x) z                 h                products g y
FastGRNN               Kusupati et al. 2018            a                      h
FastRNN                Kusupati et al. 2018            g                      h
FeedbackSCRN           Mikolov et al. 2015             s(x) h                 y s              products s y_h y_s
GatedAntisymmetricRNN  Chang et al. 2019               z(x) a                 h
GRU                    Cho et al. 2014                 r z n                  h
IndRNN                 Li et al. 2018                  a(x)                   h
IntersectionRNN        Collins et al. 2017             y h g_y g_h x(x)       y h
JANET                  Van der Westhuizen et al. 2018  f g                    h
LayerNormGRU           Ba et al. 2016                  r z n                  h                6 layer norms
LayerNormLSTM          Ba et al. 2016                  i f g o                h c              9 layer norms
LEM                    Rusch et al. 2022               d_h d_z z h(x)         h z              product h
LightRU                Ye et al. 2024                  g(x) f                 h
LiGRU                  Ravanelli et al. 2018           z g                    h
LSTM                   Gers et al. 2000                i f g o                h c
MCLSTM                 Ben-Ari et al. 2017             f i o m g              h v c
MGU                    Zhou et al. 2016                f g(x)                 h                product g
MinimalRNN             Chen 2017                       z(x) u(h)              h                product z
MiRU1                  Neurocomputing 2026             r g(x)                 h                product g
MiRU2                  Neurocomputing 2026             g                      h
MultiplicativeLSTM     Krause et al. 2016              m i(x) f(x) g(x) o(x)  h c              products i f g o
MUT1                   Jozefowicz et al. 2015          z(x) r g(x)            h                product g
MUT2                   Jozefowicz et al. 2015          z r g(x)               h                product g
MUT3                   Jozefowicz et al. 2015          z(x) r g(x)            h                products z g
NAS                    Zoph and Le 2017                a0 to a7               h c
NBRC                   Vecoven et al. 2021             a c g(x)               h
OriginalLSTM           Hochreiter et al. 1997          i g o                  h c
PeepholeLSTM           Gers et al. 2002                i f g o                h c
RAN                    Lee et al. 2017                 c(x) i f               h c
ResetFirstGRU          Cho et al. 2014                 r z n(x)               h                product n
ResidualLSTM           Kim et al. 2017                 i f g o res(x)         h c              product p
RHN                    Zilly et al. 2017               g t                    h                products g2 t2 g3 t3
RNN                    Elman 1990                      a                      h
SCRN                   Mikolov et al. 2015             s(x) h                 h s              product s
SGRN                   Zu and Wei 2021                 p                      h
SGU                    Gao and Glowacka 2016           g(x) z                 h                product g
SLSTM                  Beck et al. 2024                i f z o                h c n m
STAR                   Turkoglu et al. 2021            z(x) k                 h
TauGRU                 Erichson et al. 2023            u z(x) g a             h h_1            product z
TGRU                   Balduzzi and Ghifary 2016       z f o v_z v_f v_o (x)  h v_z v_f v_o
TLSTM                  Balduzzi and Ghifary 2016       z f o v_z v_f v_o (x)  h c v_z v_f v_o
TRNN                   Balduzzi and Ghifary 2016       z f (x)                h
UGRNN                  Collins et al. 2017             g u                    h
UnICORNN               Rusch and Mishra 2021           a(x)                   h z
WMCLSTM                Landi et al. 2021               i f g o                h c              products i f o
"""

from __future__ import annotations

from fused_rnn.zoo._torchrecurrent import from_torchrecurrent
from fused_rnn.zoo.additive import ATR, CFN, RAN, SGRN, STAR
from fused_rnn.zoo.deep import NAS, RHN, SCRN, FeedbackSCRN
from fused_rnn.zoo.forget import JANET, MGU, LightRU, MinimalRNN
from fused_rnn.zoo.gru import GRU, LiGRU, ResetFirstGRU, TauGRU
from fused_rnn.zoo.lstm import LSTM, CoupledLSTM, OriginalLSTM, PeepholeLSTM, ResidualLSTM
from fused_rnn.zoo.memory_lstm import MCLSTM, WMCLSTM, MultiplicativeLSTM
from fused_rnn.zoo.miru import MiRU1, MiRU2
from fused_rnn.zoo.mut import MUT1, MUT2, MUT3
from fused_rnn.zoo.norm import BlockGRU, DreamerGRU, LayerNormGRU, LayerNormLSTM
from fused_rnn.zoo.oscillators import LEM, AntisymmetricRNN, CoRNN, GatedAntisymmetricRNN, UnICORNN, antisymmetric
from fused_rnn.zoo.rnn import RNN
from fused_rnn.zoo.sgu import DSGU, SGU
from fused_rnn.zoo.slstm import SLSTM
from fused_rnn.zoo.ugrnn import UGRNN, IntersectionRNN
from fused_rnn.zoo.units import BRC, NBRC, TGRU, TLSTM, TRNN, FastGRNN, FastRNN, IndRNN

__all__ = [
    "ATR",
    "AntisymmetricRNN",
    "BRC",
    "BlockGRU",
    "CFN",
    "CoRNN",
    "CoupledLSTM",
    "DSGU",
    "DreamerGRU",
    "FastGRNN",
    "FastRNN",
    "FeedbackSCRN",
    "GRU",
    "GatedAntisymmetricRNN",
    "IndRNN",
    "IntersectionRNN",
    "JANET",
    "LEM",
    "LSTM",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LiGRU",
    "LightRU",
    "MCLSTM",
    "MGU",
    "MUT1",
    "MUT2",
    "MUT3",
    "MiRU1",
    "MiRU2",
    "MinimalRNN",
    "MultiplicativeLSTM",
    "NAS",
    "NBRC",
    "OriginalLSTM",
    "PeepholeLSTM",
    "RAN",
    "RHN",
    "RNN",
    "ResetFirstGRU",
    "ResidualLSTM",
    "SCRN",
    "SGRN",
    "SGU",
    "SLSTM",
    "STAR",
    "TGRU",
    "TLSTM",
    "TRNN",
    "TauGRU",
    "UGRNN",
    "UnICORNN",
    "WMCLSTM",
    "antisymmetric",
    "from_torchrecurrent",
]
